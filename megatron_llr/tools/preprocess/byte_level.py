"""Byte-level tokens: one token per byte, without a tokenizer or a download."""

import os
from collections.abc import Iterable
from pathlib import Path

# One token per byte value and an end-of-document token: `--tokenizer-type NullTokenizer
# --vocab-size 257` uses the last id as end of document.
END_OF_DOCUMENT = 256
VOCAB_SIZE = 257


def standard_library_sources() -> Iterable[bytes]:
    """The sources of Python's standard library in a fixed order: text that every machine has."""
    folder = Path(os.__file__).parent
    for path in sorted(folder.rglob("*.py")):
        folders = path.relative_to(folder).parts
        if not {"site-packages", "test", "tests", "idlelib", "__pycache__"} & set(folders):
            yield path.read_bytes()
