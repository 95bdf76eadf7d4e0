"""Byte-level text: every byte a token, so that text needs no tokenizer and no download."""

import os
from collections.abc import Iterable
from pathlib import Path

# One token per byte value, and one that ends a document: `--tokenizer-type NullTokenizer
# --vocab-size 257` reads the last id as end of document.
END_OF_DOCUMENT = 256
VOCAB_SIZE = 257


def standard_library_sources() -> Iterable[bytes]:
    """The sources of this Python's standard library, in a fixed order: text on every machine."""
    folder = Path(os.__file__).parent
    for path in sorted(folder.rglob("*.py")):
        beside = path.relative_to(folder).parts
        if not {"site-packages", "test", "tests", "idlelib", "__pycache__"} & set(beside):
            yield path.read_bytes()
