"""Extrapolate the optimal learning rate to more training tokens; see `--help`."""

import sys

from megatron_llr.tools.entry_point import run_tool
from megatron_llr.tools.extrapolate_lr.cli import main

if __name__ == "__main__":
    sys.exit(run_tool(main))
