"""Make the character-level datasets of a text: the first 90 % to train on, the rest held out.

Usage: python examples/shakespeare_char/prepare.py TEXT FOLDER

TEXT is a plain text file, as Karpathy's tinyshakespeare.txt. Every character is a token, numbered
in the order of the sorted alphabet; writes train.bin, train.idx, valid.bin, valid.idx and
alphabet.json.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

from megatron_llr.megatron import launch

# The split of nanoGPT's data/shakespeare_char/prepare.py.
TRAIN_SHARE = 0.9


def encode(text: str) -> tuple[np.ndarray, str]:
    """Ids of all characters, and the alphabet that they index."""
    alphabet = "".join(sorted(set(text)))
    index = {character: position for position, character in enumerate(alphabet)}
    return np.fromiter((index[character] for character in text), np.uint16, len(text)), alphabet


def main() -> int:
    """Write both datasets, unless the text cannot be read."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("text", type=Path, help="path of the text")
    parser.add_argument("folder", type=Path, help="where the datasets go")
    arguments = parser.parse_args()
    try:
        ids, alphabet = encode(arguments.text.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    launch.prepare_device(["--llr-device", "cpu"])
    from megatron_llr.tools.preprocess.pair import PairWriter

    cut = int(len(ids) * TRAIN_SHARE)
    for name, part in (("train", ids[:cut]), ("valid", ids[cut:])):
        with PairWriter(arguments.folder / name, len(alphabet), overwrite=True) as pair:
            pair.add(part, [len(part)])
        print(f"{arguments.folder / name}: {pair.tokens:,} tokens")
    (arguments.folder / "alphabet.json").write_text(json.dumps(alphabet), encoding="utf-8")
    print(
        f"{len(alphabet)} characters: --vocab-size {len(alphabet) + 1} (one more ends a document)"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
