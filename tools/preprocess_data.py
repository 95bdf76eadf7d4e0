"""Turn text into a dataset for Megatron's --data-path; --help says how."""

import sys

# Workers are spawned and import this file: nothing heavy here.
from megatron_llr.tools.preprocess import cli

if __name__ == "__main__":
    sys.exit(cli.main())
