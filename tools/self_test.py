"""Check that layerwise learning rates are right on this machine or cluster; see `--help`.

Usage: torchrun --nproc-per-node N [--nnodes ...] tools/self_test.py [--out FILE.json]
"""

import sys

from megatron_llr.tools.entry_point import run_tool
from megatron_llr.tools.self_test import cli

if __name__ == "__main__":
    sys.exit(run_tool(cli.main))
