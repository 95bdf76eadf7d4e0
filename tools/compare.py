"""Compare policies on a model; see `--help`."""

import sys

from megatron_llr.tools.compare.cli import main
from megatron_llr.tools.entry_point import run_tool

if __name__ == "__main__":
    sys.exit(run_tool(main))
