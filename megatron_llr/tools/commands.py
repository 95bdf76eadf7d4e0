"""The command `megatron-llr`: the programs of tools/, from the installed package."""

import sys
from collections.abc import Callable
from importlib import import_module
from typing import cast

from megatron_llr.tools.entry_point import run_tool
from megatron_llr.version import __version__

# Command -> package with a module `cli`, and what the command does.
COMMANDS = {
    "convert": ("convert", "checkpoints between Hugging Face and Megatron"),
    "preprocess": ("preprocess", "text into the indexed datasets that Megatron reads"),
    "compare": ("compare", "train a grid of policies, learning rates and seeds, and report"),
    "report": ("report", "figures and a summary of a run"),
    "extrapolate-lr": ("extrapolate_lr", "the optimal learning rate for more training tokens"),
    "export-multipliers": ("export_multipliers", "multipliers of a run for use without it"),
    "self-test": ("self_test", "check this machine; with torchrun, all ranks of a cluster"),
}

_USAGE = """usage: megatron-llr COMMAND [arguments]

{commands}

megatron-llr COMMAND --help describes a command. On several ranks, start a command with
torchrun ... -m megatron_llr.tools.commands COMMAND. To train, use
torchrun ... -m megatron_llr.megatron.pretrain with the flags of Megatron and --llr-*.

  -h, --help  show this text
  --version   show the version
"""


def usage() -> str:
    """The help text."""
    width = max(map(len, COMMANDS))
    lines = (f"  {name:{width}}  {what}" for name, (_, what) in COMMANDS.items())
    return _USAGE.format(commands="\n".join(lines))


def main() -> int:
    """Run the command that `sys.argv` names."""
    name, *rest = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print(usage(), end="")
        return 0
    if name == "--version":
        print(f"megatron-llr {__version__}")
        return 0
    if name not in COMMANDS:
        print(
            f"megatron-llr: {name} is not a command. It must be one of {', '.join(COMMANDS)}.",
            file=sys.stderr,
        )
        return 2
    # The program's name in its help and messages.
    sys.argv = [f"megatron-llr {name}", *rest]

    def run() -> int:
        # Slow to import, and not needed for the help above.
        command = import_module(f"megatron_llr.tools.{COMMANDS[name][0]}.cli").main
        return cast(Callable[[], int], command)()

    return run_tool(run)


if __name__ == "__main__":
    sys.exit(main())
