"""Convert checkpoints between Hugging Face and Megatron; see `--help`."""

import sys

from megatron_llr.tools.entry_point import run_tool


def main() -> int:
    """Import what is slow to import, then convert."""
    from megatron_llr.tools.convert import cli

    return cli.main()


if __name__ == "__main__":
    sys.exit(run_tool(main))
