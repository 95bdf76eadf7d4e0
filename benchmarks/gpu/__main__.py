"""Run the cases on this machine's GPU, or toy ones on CPU, and print one table at the end.

Usage: python -m benchmarks.gpu [--budget 540] [--only CASE,...] [--out FOLDER] [--dry-run]
"""

import argparse
import datetime
import importlib
import math
import re
import sys
import tempfile
from importlib import metadata
from pathlib import Path

import torch

from benchmarks.gpu.plan import cases
from benchmarks.gpu.result_table import table_of
from benchmarks.gpu.run_cases import ROOT, run_all
from megatron_llr.output import replaced_file


def _installed_version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        pass
    try:
        importlib.import_module(package.replace("-", "_"))
    except Exception:  # A partial installation can raise any error.
        return "none"
    # apex built in place has no metadata.
    return "importable, without a version"


def _header(name: str, *, dry_run: bool) -> list[str]:
    packages = ("megatron-core", "transformer-engine", "apex")
    title = "Dry run on CPU at toy sizes. The times mean nothing." if dry_run else name
    versions = [f"torch {torch.__version__}", f"CUDA {torch.version.cuda}"]
    versions += [f"{package} {_installed_version(package)}" for package in packages]
    return [f"# {title}", "", f"{datetime.date.today()}; {', '.join(versions)}."]


def main() -> int:
    """Run the cases, write a JSON file for each and the table, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--budget", type=float, default=None, help="seconds for all cases (540; dry run: no limit)"
    )
    parser.add_argument("--only", default="", help="names of cases, separated by commas (all)")
    parser.add_argument(
        "--out", type=Path, default=None, help="folder for the table (benchmarks/results)"
    )
    parser.add_argument("--dry-run", action="store_true", help="toy sizes on CPU")
    given = parser.parse_args()
    if not given.dry_run and not torch.cuda.is_available():
        parser.error("torch sees no GPU on this machine. --dry-run runs toy sizes on CPU.")
    chosen = cases(toy=given.dry_run)
    names = [case.name for case in chosen]
    wanted = [name for name in given.only.split(",") if name] or names
    unknown = sorted(set(wanted) - set(names))
    if unknown:
        parser.error(
            f"--only names no case: {', '.join(unknown)}. The cases are {', '.join(names)}."
        )
    budget = given.budget or (math.inf if given.dry_run else 540)
    name = "cpu" if given.dry_run else torch.cuda.get_device_name(0)
    # Results of a dry run are not kept unless a folder is given.
    scratch = tempfile.TemporaryDirectory()
    folder = given.out or (Path(scratch.name) if given.dry_run else ROOT / "benchmarks" / "results")
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    run = f"{slug}-{datetime.date.today()}"
    (folder / run).mkdir(parents=True, exist_ok=True)
    outcomes = run_all(
        [case for case in chosen if case.name in wanted],
        "cpu" if given.dry_run else "cuda",
        budget,
        folder / run,
        lambda line: print(line, flush=True),
    )
    table = table_of(outcomes, _header(name, dry_run=given.dry_run))
    with replaced_file(folder / f"{run}.md") as partial:
        partial.write_text(table)
    print(f"\n{table}", end="", flush=True)
    return 0 if all(outcome.status != "failed" for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
