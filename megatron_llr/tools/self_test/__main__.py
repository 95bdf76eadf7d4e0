"""The self-test of an installed package: `torchrun ... -m megatron_llr.tools.self_test`."""

import sys

from megatron_llr.tools.entry_point import run_tool
from megatron_llr.tools.self_test import cli

if __name__ == "__main__":
    sys.argv[0] = "self_test.py"
    sys.exit(run_tool(cli.main))
