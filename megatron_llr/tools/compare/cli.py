"""The command line of `tools/compare.py`."""

import argparse
import shlex
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from megatron_llr.tools.compare.grid import Grid
from megatron_llr.tools.compare.grid_file import read_grid
from megatron_llr.tools.compare.jobs import command, pending, run_grid

_DESCRIPTION = """Compare policies: a grid of policies, learning rates and seeds from a YAML file.

Runs every job that is not done, then writes to the grid's folder: table.txt, table.csv, runs.csv,
curves.csv, curves.png and learning_rates.png. An interrupted job restarts (with --save-interval in
the flags it resumes from its checkpoint); a finished one is not run again. `examples/stdlib.yaml`
is a grid.
"""

say = partial(print, flush=True)


def report(grid: Grid) -> None:
    """Read the finished runs, write the report and print its table."""
    from megatron_llr.tools.compare.report import write_report

    print(write_report(grid))


def build_parser() -> argparse.ArgumentParser:
    """The flags of this tool."""
    parser = argparse.ArgumentParser(
        description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("grid", type=Path, help="YAML file")
    parser.add_argument("--out", type=Path, help="folder of the runs, replaces out of the file")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (1)")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the commands of the runs that are not done"
    )
    parser.add_argument(
        "--report-only", action="store_true", help="only report on the finished runs"
    )
    parser.add_argument(
        "--rerun-changed",
        action="store_true",
        help="repeat finished runs with different settings, which are an error otherwise",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the grid, then report; returns 1 after an error or if a run failed."""
    parser = build_parser()
    given = parser.parse_args(arguments)
    try:
        grid = read_grid(given.grid, given.out)
        if given.report_only:
            report(grid)
            return 0
        waiting = pending(grid, rerun_changed=given.rerun_changed)
    except BrokenPipeError:
        raise
    except (ValueError, ImportError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    if given.dry_run:
        for run in waiting:
            print(shlex.join(command(grid, run)))
        if grid.extend or grid.sensitivity:
            print("More runs may follow from the results of these.", file=sys.stderr)
        return 0
    try:
        failed = run_grid(
            grid,
            waiting,
            jobs=max(1, given.jobs),
            say=say,
            rerun_changed=given.rerun_changed,
        )
        report(grid)
    except KeyboardInterrupt:
        print("Finished runs are kept; the same command runs the others.", file=sys.stderr)
        raise
    except BrokenPipeError:
        raise
    except (ValueError, ImportError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    return 1 if failed else 0
