"""The command line of `tools/preprocess_data.py`."""

import argparse
import logging
import os
import shlex
import sys
import warnings

from megatron_llr.tools.preprocess.formats import FORMATS
from megatron_llr.tools.preprocess.sources import DOCUMENTS, TextFormat, expand
from megatron_llr.tools.preprocess.tokenizing import Tokenizer

_DESCRIPTION = "Convert text to the .bin and .idx files that Megatron's --data-path reads."
_EXAMPLE = """example:
  python tools/preprocess_data.py 'corpus/*.jsonl.gz' --output data/corpus \\
      --tokenizer my/tokenizer --workers 16"""


def build_parser() -> argparse.ArgumentParser:
    """The flags of this tool."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s FILE... --output PREFIX [options]",
        description=_DESCRIPTION,
        epilog=_EXAMPLE,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(
            prog, max_help_position=26, width=100
        ),
    )
    add = parser.add_argument
    add("files", nargs="+", metavar="FILE", help="files, pipes or 'patterns'; gzip is decompressed")
    add(
        "--output",
        required=True,
        metavar="PREFIX",
        help="path of the .bin and .idx files without suffix",
    )
    add("--tokenizer", metavar="NAME", help="folder or Hub name (default: one token per byte)")
    add("--json-key", default="text", metavar="KEY", help="key of the text in JSON lines (text)")
    add("--format", choices=FORMATS, default="auto", help="auto: by name, or by content")
    add("--documents", choices=DOCUMENTS, default="file", help="a document of plain text (file)")
    add(
        "--append-eod",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="end each document with the end-of-document token (yes)",
    )
    add("--workers", type=int, default=1, metavar="N", help="processes that tokenize (1)")
    add("--overwrite", action="store_true", help="replace an existing dataset")
    return parser


def _import_megatron() -> None:
    """Import megatron without its messages about fused kernels and index files."""
    from megatron_llr.megatron import launch

    # This tool does not need a GPU.
    with warnings.catch_warnings(record=True):
        launch.prepare_device(["--llr-device", "cpu"])
        from megatron.core.datasets.indexed_dataset import IndexedDataset
    logging.getLogger(IndexedDataset.__module__).setLevel(logging.WARNING)
    # Without RANK Megatron's logger warns about a missing rank.
    os.environ.setdefault("RANK", "0")


def main(arguments: list[str] | None = None) -> int:
    """Preprocess, then print what was written and the flags to train on it.

    Returns:
        The exit code: 0, or 1 after an error.
    """
    given = build_parser().parse_args(arguments)
    tokenizer = Tokenizer(given.tokenizer, given.append_eod)
    try:
        text_format = TextFormat(given.format, given.json_key, given.documents)
        # Also below. Here it reports a wrong path before megatron's slow import.
        expand(given.files, text_format)
        _import_megatron()
        from megatron_llr.tools.preprocess.preprocess import Options, preprocess
        from megatron_llr.tools.preprocess.split import split_flags

        options = Options(
            inputs=tuple(given.files),
            output=given.output,
            tokenizer=tokenizer,
            text_format=text_format,
            workers=given.workers,
            overwrite=given.overwrite,
        )
        done = preprocess(options)
    except (ValueError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 1
    print(
        f"{given.output}: {done.documents:,} documents ({done.empty:,} empty documents skipped), "
        f"{done.tokens:,} tokens, {done.bytes:,} bytes in {done.seconds:.1f} s "
        f"({done.tokens / max(1e-9, done.seconds):,.0f} tokens/s); verified by reading back"
    )
    split, warning = split_flags(done.documents)
    if warning:
        print(f"megatron_llr: {warning}", file=sys.stderr)
    flags = f"--data-path {shlex.quote(given.output)} {tokenizer.training_flags} {split}"
    print(f"train on it with: {flags.rstrip()}")
    return 0
