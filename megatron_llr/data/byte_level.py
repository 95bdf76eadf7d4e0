"""Byte-level datasets: every byte a token, so that text needs no tokenizer and no download."""

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch

from megatron_llr import host

# One token per byte value, and one that ends a document: `--tokenizer-type NullTokenizer
# --vocab-size 257` reads the last id as end of document.
END_OF_DOCUMENT = 256
VOCAB_SIZE = 257


def write_dataset(documents: Iterable[bytes], prefix: str | os.PathLike[str]) -> int:
    """Write documents, byte by byte, as Megatron's `.bin` and `.idx` pair.

    Args:
        documents: the bytes of every document; empty ones are left out.
        prefix: path of the pair without suffix, for `--data-path`.

    Returns:
        Number of tokens, ends of documents included.

    Raises:
        ValueError: if no document has any text.
    """
    return write_tokens(
        (np.append(np.frombuffer(d, np.uint8), END_OF_DOCUMENT) for d in documents if d), prefix
    )


def write_tokens(documents: Iterable[np.ndarray], prefix: str | os.PathLike[str]) -> int:
    """Write documents of token ids as Megatron's `.bin` and `.idx` pair.

    The pair is written beside its place and then renamed, the index last, so that no broken pair is
    ever left behind.

    Args:
        documents: [tokens] ids of every document, each below 65,536.
        prefix: path of the pair without suffix, for `--data-path`.

    Returns:
        Number of tokens.

    Raises:
        ValueError: if there is no document.
    """
    target = Path(prefix)
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    parts = [Path(f"{part}.{suffix}") for suffix in ("bin", "idx")]
    try:
        builder = host.IndexedDatasetBuilder(str(parts[0]), dtype=np.uint16)
        tokens = 0
        for ids in documents:
            builder.add_document(torch.from_numpy(ids.astype(np.int32)), [len(ids)])
            tokens += len(ids)
        if tokens == 0:
            raise ValueError(f"megatron_llr: no text to write to {target}")
        builder.finalize(str(parts[1]))
        for path in parts:
            os.replace(path, f"{target}{path.suffix}")
    finally:
        for path in parts:
            path.unlink(missing_ok=True)
    return tokens


def standard_library_sources() -> Iterable[bytes]:
    """The sources of this Python's standard library, in a fixed order: text on every machine."""
    folder = Path(os.__file__).parent
    for path in sorted(folder.rglob("*.py")):
        beside = path.relative_to(folder).parts
        if not {"site-packages", "test", "tests", "idlelib", "__pycache__"} & set(beside):
            yield path.read_bytes()
