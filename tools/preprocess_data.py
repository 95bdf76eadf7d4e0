"""Convert text to a dataset for Megatron's --data-path; see `--help`."""

import sys

# Workers are spawned and import this file, so it must not import anything slow.
from megatron_llr.tools.entry_point import run_tool
from megatron_llr.tools.preprocess import cli

if __name__ == "__main__":
    sys.exit(run_tool(cli.main))
