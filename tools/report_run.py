"""Figures and a summary of a run, from its log folder; see `--help`."""

import sys

from megatron_llr.tools.entry_point import run_tool
from megatron_llr.tools.report.cli import main

if __name__ == "__main__":
    sys.exit(run_tool(main))
