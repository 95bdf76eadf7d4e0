"""The command line of the converter; `tools/convert_checkpoint.py` calls it."""

import argparse
import os
import sys
import warnings
from pathlib import Path

import torch

from megatron_llr.errors import input_error
from megatron_llr.tools.convert.options import Options
from megatron_llr.tools.convert.tokenizer_files import CONFIG
from megatron_llr.tools.progress import Progress

_EXAMPLE = """\
example:
  %(prog)s ~/models/Llama-3.2-1B runs/llama          # Hugging Face -> Megatron
  torchrun ... pretrain_gpt_llr.py --load runs/llama $(cat runs/llama/model_flags.txt) ...
  %(prog)s runs/trained hf/trained --files runs/llama/hugging_face    # and back"""

_UNITS = {"MB": 10**6, "GB": 10**9}


def _bytes(text: str) -> int:
    number, unit = text[:-2], text[-2:].upper()
    if unit not in _UNITS or not number.replace(".", "", 1).isdigit() or not float(number):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 500MB or 2GB")
    return int(float(number) * _UNITS[unit])


def _iteration(text: str) -> str:
    if text != "release" and not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor release")
    return text


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def parser() -> argparse.ArgumentParser:
    """The flags; the help fits on one screen."""
    made = argparse.ArgumentParser(
        description="Convert a dense LLaMA, Mistral, Qwen2 or Qwen3 between Hugging Face "
        "safetensors and Megatron torch_dist; the direction follows from INPUT. Needs no GPU.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = made.add_argument
    add("input", type=Path, metavar="INPUT", help="folder with config.json, or Megatron's --save")
    add("output", type=Path, metavar="OUTPUT", help="folder to make")
    dtypes = ("float32", "bfloat16", "float16")
    add("--dtype", choices=dtypes, help="of the weights (default: unchanged)")
    add(
        "--iteration",
        type=_iteration,
        help="Megatron checkpoint to read, a number or `release` (default: last)",
    )
    text = "folder to copy config.json and tokenizer from, or a tokenizer only"
    add("--files", "--tokenizer", type=Path, metavar="DIR", help=text)
    add(
        "--vocab-size",
        type=_positive,
        metavar="N",
        help="rows to keep (default: config.json's, else the tokenizer's)",
    )
    text = "pad Megatron's vocabulary to a multiple (default: 128)"
    add("--vocab-multiple", type=_positive, default=128, metavar="N", help=text)
    text = "largest output file (default: 2GB); one is held in memory"
    add("--shard-size", type=_bytes, default=2 * 10**9, metavar="SIZE", help=text)
    return made


def convert(source: Path, target: Path, options: Options) -> list[str]:
    """Convert in the direction that the input implies; returns the lines of the final table."""
    from megatron_llr.tools.convert.to_hugging_face import to_hugging_face
    from megatron_llr.tools.convert.to_megatron import to_megatron

    if not source.is_dir():
        raise input_error(
            f"There is no folder {source}. INPUT must be a folder with config.json, or one given "
            "to Megatron's --save. Check the path."
        )
    forward = (source / CONFIG).exists()
    with Progress() as progress:
        if forward:
            report = to_megatron(source, target, options, progress)
        else:
            report = to_hugging_face(source, target, options, progress)
    table = list(report.lines(to_megatron=forward))
    return [*table, f"{report.numel / 1e6:,.1f}M parameters written to {target}"]


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    args = parser().parse_args(arguments)
    options = Options(
        dtype=getattr(torch, args.dtype) if args.dtype else None,
        vocab_multiple=args.vocab_multiple,
        vocab_size=args.vocab_size,
        shard_size=args.shard_size,
        iteration=args.iteration,
        files=args.files,
    )
    # Warnings of Megatron and PyTorch about missing GPUs and ranks do not concern this command.
    warnings.simplefilter("ignore")
    # The converter's own errors say what transformers would warn about.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        lines = convert(args.input, args.output, options)
    except BrokenPipeError:
        raise
    except (ValueError, OSError) as failed:
        # Names from a file can have line breaks and control characters, and any length.
        text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(failed))
        print(text[:1500], file=sys.stderr)
        return 1
    print("\n".join(lines))
    return 0
