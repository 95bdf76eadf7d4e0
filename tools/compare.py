"""Compare policies on your own model: a grid of policies, learning rates and seeds from one YAML.

Usage: python tools/compare.py GRID.yaml

Runs every job that is not done yet, then writes into the grid's folder: table.txt, table.csv,
runs.csv, curves.csv, curves.png and learning_rates.png. A job that was interrupted begins again (or
goes on from its checkpoint, with --save-interval among the flags); a finished one is never run
twice. `examples/stdlib.yaml` is a grid.
"""

import argparse
import shlex
import signal
import sys
from functools import partial
from pathlib import Path
from types import FrameType
from typing import NoReturn

from megatron_llr.tools.compare.grid import Grid, read_grid
from megatron_llr.tools.compare.jobs import command, pending, run_grid

say = partial(print, flush=True)
_ENDINGS = (signal.SIGTERM, signal.SIGHUP)


def write_report(grid: Grid) -> None:
    """Read what is done, write the report and print its table."""
    from megatron_llr.tools.compare.report import report

    print(report(grid))


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    """Interrupt once: shells send SIGHUP twice, and the second must not end the ending of jobs."""
    for each in _ENDINGS:
        signal.signal(each, signal.SIG_IGN)
    raise KeyboardInterrupt


def main() -> int:
    """Run the grid, then report; 1 if something was wrong or a run failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("grid", type=Path, help="YAML file")
    parser.add_argument("--out", type=Path, help="folder of the runs, instead of the file's")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (1)")
    parser.add_argument("--dry-run", action="store_true", help="print the commands that are left")
    parser.add_argument("--report-only", action="store_true", help="report on what is done")
    parser.add_argument(
        "--rerun-changed",
        action="store_true",
        help="run again what was made with other settings; without it that is an error",
    )
    given = parser.parse_args()
    try:
        grid = read_grid(given.grid, given.out)
        if given.report_only:
            write_report(grid)
            return 0
        waiting = pending(grid, rerun_changed=given.rerun_changed)
    except (ValueError, ImportError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    if given.dry_run:
        for run in waiting:
            print(shlex.join(command(grid, run)))
        return 0
    # A batch system's SIGTERM and a closed terminal end the jobs as Ctrl-C does; none may outlive
    # this. Under nohup a closed terminal is ignored already.
    for number in _ENDINGS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _interrupt)
    try:
        failed = run_grid(grid, waiting, jobs=max(1, given.jobs), say=say)
    except KeyboardInterrupt:
        print("interrupted: finished runs are kept; the same command goes on", file=sys.stderr)
        return 130
    except ValueError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    write_report(grid)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
