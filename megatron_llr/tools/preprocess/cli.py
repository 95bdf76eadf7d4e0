"""The command line of `tools/preprocess_data.py`."""

import argparse
import logging
import os
import shlex
import sys
import warnings

from megatron_llr.tools.preprocess.sources import DOCUMENTS, FORMATS, expand
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
    add("files", nargs="+", metavar="FILE", help="files or 'patterns'; .gz is decompressed")
    add(
        "--output",
        required=True,
        metavar="PREFIX",
        help="path of the .bin and .idx files without suffix",
    )
    add("--tokenizer", metavar="NAME", help="folder or Hub name (default: one token per byte)")
    add("--json-key", default="text", metavar="KEY", help="key of the text in JSON lines (text)")
    add("--format", choices=FORMATS, default="auto", help="auto: JSON lines if named .jsonl, .json")
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
        expand(given.files)  # also below; reports a wrong path before megatron's slow import
        _import_megatron()
        from megatron_llr.tools.preprocess.preprocess import Options, preprocess

        options = Options(
            inputs=tuple(given.files),
            output=given.output,
            tokenizer=tokenizer,
            json_key=given.json_key,
            form=given.format,
            documents=given.documents,
            workers=given.workers,
            overwrite=given.overwrite,
        )
        done = preprocess(options)
        from megatron_llr.megatron import data_splits
    except (ValueError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 1
    print(
        f"{given.output}: {done.documents:,} documents ({done.empty:,} empty documents skipped), "
        f"{done.tokens:,} tokens, {done.bytes:,} bytes in {done.seconds:.1f} s "
        f"({done.tokens / max(1e-9, done.seconds):,.0f} tokens/s); verified by reading back"
    )
    path = shlex.quote(given.output)
    empty = data_splits.default_split_leaves_empty(done.documents)
    split = f"{data_splits.suggested_split(done.documents)} " if empty else ""
    print(f"train on it with: --data-path {path} {split}{tokenizer.training_flags}")
    if empty:
        print(
            f"warning: Megatron's default --split {data_splits.DEFAULT_SPLIT} would leave the "
            f"{' and '.join(empty)} split empty, with documents: {done.documents}. Use the --split "
            "above, or make more documents of plain text with --documents paragraph or line.",
            file=sys.stderr,
        )
    return 0
