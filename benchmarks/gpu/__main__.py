"""Run the cases on this machine's GPU, or toy ones on CPU, and print one table last.

Usage: python -m benchmarks.gpu [--budget 540] [--only CASE,...] [--out FOLDER] [--dry-run]
"""

import argparse
import datetime
import importlib
import re
import sys
import tempfile
from importlib import metadata
from pathlib import Path

import torch

from benchmarks.gpu.plan import cases
from benchmarks.gpu.report import table_of
from benchmarks.gpu.runner import ROOT, run_all
from megatron_llr.output import replaced_file


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        pass
    try:
        importlib.import_module(package.replace("-", "_"))
    except Exception:  # a partial installation fails in ways of its own
        return "none"
    # apex built in place has no metadata.
    return "importable, without a version"


def _header(name: str, *, dry_run: bool) -> list[str]:
    packages = ("megatron-core", "transformer-engine", "apex")
    title = "Dry run on CPU at toy sizes: no figure here says anything." if dry_run else name
    versions = [f"torch {torch.__version__}", f"CUDA {torch.version.cuda}"]
    versions += [f"{package} {_version(package)}" for package in packages]
    return [f"# {title}", "", f"{datetime.date.today()}; {', '.join(versions)}."]


def main() -> int:
    """Run, write a JSON file per case and the table, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--budget", type=float, default=540, help="seconds for all cases together")
    parser.add_argument("--only", default="", help="cases to run, with commas between; all if none")
    parser.add_argument(
        "--out", type=Path, default=None, help="folder for the table (benchmarks/results)"
    )
    parser.add_argument("--dry-run", action="store_true", help="toy sizes on CPU")
    given = parser.parse_args()
    if not given.dry_run and not torch.cuda.is_available():
        parser.error("torch sees no GPU here; --dry-run runs toy sizes on CPU")
    chosen = cases(toy=given.dry_run)
    names = [case.name for case in chosen]
    wanted = [name for name in given.only.split(",") if name] or names
    unknown = sorted(set(wanted) - set(names))
    if unknown:
        parser.error(f"--only: no case {', '.join(unknown)}; there are {', '.join(names)}")
    name = "cpu" if given.dry_run else torch.cuda.get_device_name(0)
    # A dry run leaves nothing among the results, unless a folder is given.
    scratch = tempfile.TemporaryDirectory()
    folder = given.out or (Path(scratch.name) if given.dry_run else ROOT / "benchmarks" / "results")
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    run = f"{slug}-{datetime.date.today()}"
    (folder / run).mkdir(parents=True, exist_ok=True)
    outcomes = run_all(
        [case for case in chosen if case.name in wanted],
        "cpu" if given.dry_run else "cuda",
        given.budget,
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
