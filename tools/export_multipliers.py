"""Export a run's multipliers for use without this extension; see `--help`."""

import sys

from megatron_llr.tools.entry_point import run_tool
from megatron_llr.tools.export_multipliers.cli import main

if __name__ == "__main__":
    sys.exit(run_tool(main))
