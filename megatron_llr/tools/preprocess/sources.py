"""Text files as chunks of raw documents in a fixed order: JSON lines or plain text, gzip or not."""

import glob
import gzip
import itertools
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, BinaryIO, cast

from megatron_llr.errors import user_error

FORMATS = ("auto", "jsonl", "text")
DOCUMENTS = ("file", "paragraph", "line")

# Documents travel to the workers in chunks of about this size: large enough that sending them costs
# little, small enough that a few per worker fit in memory.
CHUNK_BYTES = 1 << 20

# How files that are not text begin, and what makes text of them; as far as text cannot begin so.
_NOT_TEXT = {
    "gzip": (rb"\x1f\x8b\x08", "rename it to end in .gz"),
    "bzip2": (rb"BZh[1-9](1AY&SY|\x17rE8P\x90)", "decompress it first (bzip2 -d)"),
    "xz": (rb"\xfd7zXZ\0", "decompress it first (xz -d)"),
    "zstd": (rb"\x28\xb5\x2f\xfd", "decompress it first (zstd -d)"),
    "Parquet": (rb"PAR1\x15", "write its texts as JSON lines first"),
}

Numbered = tuple[int, bytes]
"""(number of its first line, from 1, raw bytes) of a document."""


@dataclass(frozen=True)
class Chunk:
    """Documents of one file, as they stand there.

    Attributes:
        path: the file.
        json_key: key of the text in each JSON line; None for plain text.
        documents: in the file's order.
        read: bytes of the file (compressed ones, if it is) read since the chunk before.
    """

    path: str
    json_key: str | None
    documents: tuple[Numbered, ...]
    read: int

    def texts(self) -> list[bytes]:
        """The text of every document, as UTF-8 where it comes from JSON.

        Raises:
            ValueError: naming file and line of one that has none.
        """
        if self.json_key is None:
            return [document for _, document in self.documents]
        return [self._from_json(line, document) for line, document in self.documents]

    def _from_json(self, line: int, document: bytes) -> bytes:
        place, key = f"{self.path}:{line}", str(self.json_key)
        try:
            found = json.loads(document)
        except ValueError as broken:
            raise user_error(
                f"{place} is not JSON",
                got=str(broken),
                allowed="one JSON object per line",
                remedy="mend or drop the line, or set --format text",
            ) from None
        text = found.get(key) if isinstance(found, dict) else None
        if not isinstance(text, str):
            got = f"keys {', '.join(map(repr, found))}" if isinstance(found, dict) else repr(found)
            if isinstance(found, dict) and key in found:
                got = f"a value of type {type(text).__name__}"
            raise user_error(
                f"{place} has no text under the key {key!r}",
                got=got[:200],
                allowed=f'{{"{key}": "..."}}',
                remedy="set --json-key",
            )
        try:
            return text.encode()
        except UnicodeEncodeError as broken:
            raise user_error(
                f"{place} has half a surrogate pair",
                got=broken.reason,
                allowed="text that UTF-8 can hold",
                remedy="mend or drop the line",
            ) from None


def expand(patterns: Sequence[str]) -> list[str]:
    """The files that paths and glob patterns name; a pattern's own in alphabetical order.

    Raises:
        ValueError: if one names no readable file or one that is not text, or two name the same.
    """
    paths: list[str] = []
    for pattern in patterns:
        found = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
        files = [path for path in found if os.path.isfile(path)]
        if not files:
            raise user_error(
                f"cannot read {pattern}",
                got="a folder" if found else "no such file",
                allowed="files, or patterns of files such as 'data/*.jsonl'",
                remedy="correct the path",
            )
        paths += files
    twice = {path for path in paths if paths.count(path) > 1}
    if twice:
        raise user_error(
            "an input is named twice",
            got=", ".join(sorted(twice)),
            allowed="each file once",
            remedy="drop one of the patterns that name it",
        )
    for path in paths:
        _check_is_text(path)
    return paths


def _check_is_text(path: str) -> None:
    """Refuse a file that would be taken for text byte by byte; gzip that is named .gz may pass."""
    try:
        with open(path, "rb") as file:
            start = file.read(16)
    except OSError as broken:
        raise _cannot_read(path, broken) from broken
    for form, (beginning, remedy) in _NOT_TEXT.items():
        if re.match(beginning, start) and not (form == "gzip" and path.endswith(".gz")):
            raise user_error(
                f"{path} is not text",
                got=f"{form} by its first bytes",
                allowed="JSON lines or plain text, also as gzip in a file named .gz",
                remedy=remedy,
            )


def is_json_lines(path: str, form: str) -> bool:
    """Whether a file is JSON lines: as `form` (one of FORMATS) says, or by its name."""
    name = path.removesuffix(".gz")
    return form == "jsonl" or (form == "auto" and name.endswith((".jsonl", ".json")))


def read_chunks(path: str, *, json_key: str | None, documents: str) -> Iterator[Chunk]:
    """The documents of a file.

    Args:
        path: the file; one that ends in .gz is decompressed.
        json_key: key of the text in JSON lines; None for plain text.
        documents: what a document of plain text is, one of DOCUMENTS.

    Raises:
        ValueError: if it cannot be read, or is not what its name says.
    """
    try:
        with open(path, "rb") as raw, _decompressed(path, raw) as file:
            if json_key is not None:
                numbered = _lines(file)
            elif documents == "file":
                numbered = iter([(1, file.read())])
            else:
                numbered = _lines(file) if documents == "line" else _paragraphs(file)
            before = 0
            for batch in _batches(numbered):
                before, read = raw.tell(), raw.tell() - before
                yield Chunk(path, json_key, batch, read)
    except (OSError, EOFError, zlib.error) as broken:
        raise _cannot_read(path, broken) from broken


def _cannot_read(path: str, broken: Exception) -> ValueError:
    return user_error(
        f"cannot read {path}",
        got=getattr(broken, "strerror", None) or str(broken),
        allowed="a readable file" + (", gzip as its name says" if path.endswith(".gz") else ""),
        remedy="correct the path, its permissions, or the file",
    )


def _decompressed(path: str, raw: BinaryIO) -> IO[bytes]:
    return cast(IO[bytes], gzip.GzipFile(fileobj=raw)) if path.endswith(".gz") else raw


def total_bytes(paths: Iterable[str]) -> int:
    """Bytes of all files together, as they lie on disk."""
    return sum(Path(path).stat().st_size for path in paths)


def _lines(file: IO[bytes]) -> Iterator[Numbered]:
    """Lines that are not blank, without their ends."""
    for number, line in enumerate(file, start=1):
        if line.strip():
            yield number, line.rstrip(b"\r\n")


def _paragraphs(file: IO[bytes]) -> Iterator[Numbered]:
    """Stretches of lines between blank ones."""
    numbered = enumerate(file, start=1)
    for blank, group in itertools.groupby(numbered, key=lambda item: not item[1].strip()):
        if not blank:
            (first, line), *rest = group
            yield first, line + b"".join(more for _, more in rest)


def _batches(numbered: Iterable[Numbered]) -> Iterator[tuple[Numbered, ...]]:
    batch: list[Numbered] = []
    size = 0
    for document in numbered:
        batch.append(document)
        size += len(document[1])
        if size >= CHUNK_BYTES:
            yield tuple(batch)
            batch, size = [], 0
    if batch:
        yield tuple(batch)
