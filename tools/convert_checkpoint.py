"""Convert checkpoints between Hugging Face and Megatron; see `--help`."""

import sys

from megatron_llr.convert.command import main

if __name__ == "__main__":
    sys.exit(main())
