"""Convert checkpoints between Hugging Face and Megatron; see `--help`."""

import sys

from megatron_llr.tools.convert.cli import main

if __name__ == "__main__":
    sys.exit(main())
