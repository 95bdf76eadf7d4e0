"""Make a corpus and a tokenizer from a folder of source code and documentation.

Usage: python examples/code_corpus.py SOURCES OUT [--megabytes 300] [--vocab-size 32000]

Writes OUT/corpus.jsonl, one document per file in a seeded random order, and OUT/tokenizer, a
byte-level BPE trained on it, for tools/preprocess_data.py.
"""

import argparse
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path

from megatron_llr.tools.entry_point import run_tool

SUFFIXES = {".c", ".h", ".S", ".py", ".sh", ".rs", ".rst", ".md", ".txt"}
SEED = 1
END = "<|endoftext|>"


def documents(folder: Path, limit: int) -> Iterator[str]:
    """Texts of a folder's files in a random order, up to `limit` bytes; others than UTF-8 are left
    out.
    """
    paths = sorted(p for p in folder.rglob("*") if p.suffix in SUFFIXES and p.is_file())
    random.Random(SEED).shuffle(paths)
    total = 0
    for path in paths:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        total += len(text.encode())
        if total > limit:
            return
        if text:
            yield text


def main() -> int:
    """Write the corpus and the tokenizer; returns 1 after an error."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sources", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--megabytes", type=float, default=300.0, help="most text to use (300)")
    parser.add_argument("--vocab-size", type=int, default=32000, help="tokens of the BPE (32000)")
    given = parser.parse_args()
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    texts = list(documents(given.sources, int(given.megabytes * 1e6)))
    if not texts:
        print(
            f"{given.sources} has no text file with a suffix of {', '.join(sorted(SUFFIXES))}. "
            "Give the folder of an unpacked source tree.",
            file=sys.stderr,
        )
        return 1
    given.out.mkdir(parents=True, exist_ok=True)
    with (given.out / "corpus.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        texts, vocab_size=given.vocab_size, special_tokens=[END], show_progress=False
    )
    PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token=END).save_pretrained(
        given.out / "tokenizer"
    )
    size = sum(len(text.encode()) for text in texts) / 1e6
    print(f"{len(texts)} documents, {size:.1f} MB; tokenizer with {bpe.get_vocab_size()} tokens")
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
