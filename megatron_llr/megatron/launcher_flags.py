"""Flags that a launch script adds to its own: fallbacks for absent packages, FP8 widths.

Usage: python -m megatron_llr.megatron.launcher_flags [--round-ffn] -- MEGATRON_FLAGS

Prints one word per line, to be appended to the command, and to stderr why. --round-ffn rounds
--ffn-hidden-size up to a width that FP8 products can have, and does nothing without --fp8-format.
Does not import megatron; torch only where an extension of apex is installed.
"""

import argparse
import os
import sys
from collections.abc import Sequence

from megatron_llr.megatron.fp8_widths import multiple_of
from megatron_llr.megatron.package_needs import Fallback, Installed, fallbacks, installed


def build_parser() -> argparse.ArgumentParser:
    """The flags of Megatron that are read here, with Megatron's names and defaults."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    add = parser.add_argument
    add("--transformer-impl", default="transformer_engine")
    add("--normalization", default="LayerNorm")
    add("--position-embedding-type", default="learned_absolute")
    for flag in (
        "--no-persist-layer-norm",
        "--use-rotary-position-embeddings",
        "--multi-latent-attention",
        "--bf16",
        "--fp16",
    ):
        add(flag, action="store_true")
    for flag, name in (
        ("--no-gradient-accumulation-fusion", "gradient_accumulation_fusion"),
        ("--no-masked-softmax-fusion", "masked_softmax_fusion"),
        ("--no-rope-fusion", "apply_rope_fusion"),
    ):
        add(flag, action="store_false", dest=name)
    add("--fp8-format", dest="fp8")
    add("--fp8-recipe", default="delayed")
    add("--ffn-hidden-size", type=int)
    add("--tensor-model-parallel-size", type=int, default=1)
    return parser


def _rounded(args: argparse.Namespace) -> int | None:
    """The width with which FP8 products work, if it is another one than given."""
    if not args.fp8 or args.ffn_hidden_size is None:
        return None
    step = multiple_of(args.fp8_recipe) * args.tensor_model_parallel_size
    width: int = -(-args.ffn_hidden_size // step) * step
    return None if width == args.ffn_hidden_size else width


def _explanation(needed: Sequence[Fallback]) -> list[str]:
    slower = {"--transformer-impl": ", so the layers are Megatron's local ones, which are slower"}
    by_reason: dict[str, list[str]] = {}
    for each in needed:
        by_reason.setdefault(each.reason + slower.get(each.flags[0], ""), []).extend(each.flags)
    return [f"{reason}: added {' '.join(flags)}" for reason, flags in by_reason.items()]


def added_flags(
    arguments: Sequence[str], *, round_ffn: bool, has: Installed = installed
) -> tuple[list[str], list[str]]:
    """Flags to append to a command, and a line for each reason.

    Args:
        arguments: Megatron's flags of the command.
        round_ffn: whether --ffn-hidden-size may change for FP8.
        has: whether a module is installed.
    """
    args, _ = build_parser().parse_known_args(arguments)
    needed = fallbacks(args, has)
    words = [word for each in needed for word in each.flags]
    lines = _explanation(needed)
    width = _rounded(args) if round_ffn else None
    if width is not None:
        words += ["--ffn-hidden-size", str(width)]
        lines.append(
            f"FP8 products need multiples of {multiple_of(args.fp8_recipe)} on each rank: "
            f"--ffn-hidden-size {args.ffn_hidden_size} is rounded up to {width}"
        )
    return words, lines


def main(arguments: Sequence[str]) -> int:
    """Print the flags to add to those after --."""
    parser = argparse.ArgumentParser(prog="launcher_flags", description=__doc__)
    parser.add_argument("--round-ffn", action="store_true")
    parser.add_argument("flags", nargs="*", metavar="MEGATRON_FLAGS")
    given = parser.parse_args(arguments)
    words, lines = added_flags(given.flags, round_ffn=given.round_ffn)
    # Once per job: SLURM starts a launcher on every node.
    for line in lines if os.environ.get("SLURM_NODEID", "0") == "0" else ():
        print(f"megatron_llr: {line}", file=sys.stderr)
    for word in words:
        print(word)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
