"""The command line of `tools/self_test.py`."""

import argparse
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_llr.tools.self_test.environment import set_deterministic
from megatron_llr.tools.self_test.layouts import Layout, fitting, selected

DESCRIPTION = """Check that layerwise learning rates are right on this machine or cluster.

Usage: torchrun --nproc-per-node N [--nnodes ...] tools/self_test.py [--out FILE.json], or with
-m megatron_llr.tools.self_test in place of the script.

Prints versions and missing packages. Then trains small models on generated data in Megatron's own
loop, on every parallel layout that the ranks allow, and checks that
  uniform      --llr-policy uniform is bitwise plain Megatron
  multipliers  all layouts measure the same multipliers on the same weights
  rates        every element moves at base learning rate times multiplier
  resume       a run that is saved inside a ramp resumes bitwise
The exit code is 1 if anything fails. Send the JSON file with a bug report.
"""


def build_parser() -> argparse.ArgumentParser:
    """The parser of the flags."""
    parser = argparse.ArgumentParser(
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("self_test.json"),
        help="JSON file, in a folder that all nodes share (self_test.json)",
    )
    parser.add_argument("--only", default="", help="names of layouts, separated by commas")
    parser.add_argument(
        "--list", action="store_true", help="print the layouts for this number of ranks and exit"
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=120,
        help="seconds without progress after which the ranks that hang are named (120)",
    )
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    return parser


def _single_rank() -> None:
    """Without a launcher, this process is the only rank."""
    if "RANK" in os.environ:
        return
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port))


def _listing(layouts: Sequence[Layout], default: Sequence[Layout]) -> str:
    lines = [
        f"{'*' if layout in default else ' '} {layout.name:30} {' '.join(layout.flags)}".rstrip()
        for layout in layouts
    ]
    return "\n".join([*lines, "* is checked without --only"])


def main() -> int:
    """Run the self-test on this rank."""
    parser = build_parser()
    given = parser.parse_args()
    _single_rank()
    ranks, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    # Captured by torch, cuBLAS and NCCL when they are loaded.
    set_deterministic(os.environ)
    try:
        only = [name for name in given.only.split(",") if name]
        layouts = selected(ranks, only)
        if given.list:
            if rank == 0:
                print(_listing(fitting(ranks), selected(ranks)))
            return 0
        return _run(given, layouts, only)
    except ValueError as error:
        # The same on all ranks.
        if rank == 0:
            print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1


def _run(given: argparse.Namespace, layouts: Sequence[Layout], only: Sequence[str]) -> int:
    from megatron_llr.tools.self_test import runner

    options = runner.Options(layouts, only, given.device, given.out.absolute(), given.timeout)
    return runner.SelfTest(options, runner.Terminal()).run()
