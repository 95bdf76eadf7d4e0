"""Reads JSON lines or plain text, optionally gzipped, as chunks of raw documents in order."""

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

from megatron_llr.errors import input_error

FORMATS = ("auto", "jsonl", "text")
DOCUMENTS = ("file", "paragraph", "line")

# Approximate size of the chunks sent to workers: large enough to make sending cheap, small enough
# for several per worker in memory.
CHUNK_BYTES = 1 << 20

# First bytes of files that are not text, and what to do with them. Text cannot start like this.
_NOT_TEXT = {
    "gzip": (rb"\x1f\x8b\x08", "Rename it to end in .gz"),
    "bzip2": (rb"BZh[1-9](1AY&SY|\x17rE8P\x90)", "Decompress it first (bzip2 -d)"),
    "xz": (rb"\xfd7zXZ\0", "Decompress it first (xz -d)"),
    "zstd": (rb"\x28\xb5\x2f\xfd", "Decompress it first (zstd -d)"),
    "Parquet": (rb"PAR1\x15", "Write its texts as JSON lines first"),
}

Numbered = tuple[int, bytes]
"""(number of its first line, starting at 1, and raw bytes) of a document."""


@dataclass(frozen=True)
class Chunk:
    """Unparsed documents of one file.

    Attributes:
        path: the file.
        json_key: key of the text in each JSON line; None for plain text.
        documents: in the order of the file.
        read: bytes of the file (before decompression) read since the previous chunk.
    """

    path: str
    json_key: str | None
    documents: tuple[Numbered, ...]
    read: int

    def texts(self) -> list[bytes]:
        """The text of every document, encoded as UTF-8 if it comes from JSON.

        Raises:
            ValueError: with file and line of a document without text.
        """
        if self.json_key is None:
            return [document for _, document in self.documents]
        return [self._from_json(line, document) for line, document in self.documents]

    def _from_json(self, line: int, document: bytes) -> bytes:
        place, key = f"{self.path}:{line}", str(self.json_key)
        try:
            value = json.loads(document)
        except ValueError as broken:
            raise input_error(
                f"{place} is not JSON: {broken}. Each line must be one JSON object. Fix or remove "
                "the line, or set --format text."
            ) from None
        text = value.get(key) if isinstance(value, dict) else None
        if not isinstance(text, str):
            content = repr(value)
            if isinstance(value, dict):
                content = f"the keys {', '.join(map(repr, value))}"
                if key in value:
                    content = f"a value of type {type(text).__name__}"
            raise input_error(
                f"{place} has no text with the key {key!r}: it has {content[:200]}. It must be "
                "like "
                f'{{"{key}": "..."}}. Set --json-key to the key of the text.'
            )
        try:
            return text.encode()
        except UnicodeEncodeError as broken:
            raise input_error(
                f"{place} has an unpaired surrogate: {broken.reason}. It must be text that can be "
                "encoded as UTF-8. Fix or remove the line."
            ) from None


def expand(patterns: Sequence[str]) -> list[str]:
    """The files that match paths and glob patterns; those of a pattern in alphabetical order.

    Raises:
        ValueError: if a pattern matches no readable file or a file that is not text, or a file is
            matched twice.
    """
    paths: list[str] = []
    for pattern in patterns:
        exists = os.path.exists(pattern)
        matches = [pattern] if exists else sorted(glob.glob(pattern, recursive=True))
        files = [path for path in matches if os.path.isfile(path)]
        if not files:
            raise input_error(
                f"Cannot read {pattern}: {'it is a folder' if matches else 'no such file'}. FILE "
                "must be a file, or a pattern of files such as 'data/*.jsonl'. Correct the path."
            )
        paths += files
    twice = {path for path in paths if paths.count(path) > 1}
    if twice:
        raise input_error(
            f"An input is given twice: {', '.join(sorted(twice))}. Each file may be given only "
            "once. Remove one of the patterns that match it."
        )
    for path in paths:
        _check_is_text(path)
    return paths


def _check_is_text(path: str) -> None:
    """Refuse binary files, which could be read as bytes of text; gzip named .gz is allowed."""
    try:
        with open(path, "rb") as file:
            start = file.read(16)
    except OSError as broken:
        raise _cannot_read(path, broken) from broken
    for form, (signature, remedy) in _NOT_TEXT.items():
        if re.match(signature, start) and not (form == "gzip" and path.endswith(".gz")):
            raise input_error(
                f"{path} is not text: its first bytes are those of {form}. It must be JSON lines "
                f"or plain text, optionally gzipped in a file named .gz. {remedy}."
            )


def is_json_lines(path: str, form: str) -> bool:
    """Whether a file is JSON lines, by `form` (one of FORMATS) or by its name."""
    name = path.removesuffix(".gz")
    return form == "jsonl" or (form == "auto" and name.endswith((".jsonl", ".json")))


def read_chunks(path: str, *, json_key: str | None, documents: str) -> Iterator[Chunk]:
    """The documents of a file.

    Args:
        path: the file; decompressed if it ends in .gz.
        json_key: key of the text in JSON lines; None for plain text.
        documents: unit of a document in plain text, one of DOCUMENTS.

    Raises:
        ValueError: if it cannot be read, or does not have the format of its name.
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
    kind = "a readable gzip file" if path.endswith(".gz") else "a readable file"
    return input_error(
        f"Cannot read {path}: {getattr(broken, 'strerror', None) or broken}. It must be {kind}. "
        "Correct the path, its permissions or the file."
    )


def _decompressed(path: str, raw: BinaryIO) -> IO[bytes]:
    return cast(IO[bytes], gzip.GzipFile(fileobj=raw)) if path.endswith(".gz") else raw


def total_bytes(paths: Iterable[str]) -> int:
    """Total size of all files on disk."""
    return sum(Path(path).stat().st_size for path in paths)


def _lines(file: IO[bytes]) -> Iterator[Numbered]:
    """Lines that are not blank, without line endings."""
    for number, line in enumerate(file, start=1):
        if line.strip():
            yield number, line.rstrip(b"\r\n")


def _paragraphs(file: IO[bytes]) -> Iterator[Numbered]:
    """Runs of consecutive lines that are not blank."""
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
