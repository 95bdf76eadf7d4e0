"""Reads JSON lines or plain text, optionally gzipped, as chunks of raw documents in order."""

import glob
import gzip
import io
import itertools
import os
import stat
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any, BinaryIO, cast

from megatron_llr.errors import input_error
from megatron_llr.tools.preprocess import formats, json_text
from megatron_llr.tools.preprocess.pieces import CHUNK_BYTES, Piece, cut

DOCUMENTS = ("file", "paragraph", "line")

# Longest JSON line. It is parsed as a whole, which takes several times its size in memory.
LONGEST_LINE = 1 << 30

_READABLE = {stat.S_IFREG, stat.S_IFIFO, stat.S_IFCHR}


@dataclass(frozen=True)
class TextFormat:
    """How files are read.

    Attributes:
        form: one of `formats.FORMATS`.
        json_key: key of the text in JSON lines.
        documents: unit of a document in plain text, one of DOCUMENTS.
    """

    form: str = "auto"
    json_key: str = "text"
    documents: str = "file"


@dataclass(frozen=True)
class Source:
    """An input file.

    Attributes:
        path: the file.
        size: its bytes, before decompression; 0 for a pipe.
        one_document: whether it is one document of as many bytes as the file. False for a pipe,
            which can only be read once.
    """

    path: str
    size: int
    one_document: bool


@dataclass(frozen=True)
class Chunk:
    """Unparsed documents of one file, or a piece of a long document.

    Attributes:
        path: the file.
        json_key: key of the text in each JSON line; None for plain text.
        documents: in the order of the file; a single one that has context if it is only a piece.
        read: bytes of the file (before decompression) read since the previous chunk.
    """

    path: str
    json_key: str | None
    documents: tuple[Piece, ...]
    read: int

    def texts(self) -> list[bytes]:
        """The text of every document, encoded as UTF-8 if it comes from JSON.

        Raises:
            ValueError: with file and line of a document without text.
        """
        key = self.json_key
        if key is None:
            return [document.content for document in self.documents]
        return [
            json_text.text_of(document.content, key, f"{self.path}:{document.line}")
            for document in self.documents
        ]


def expand(patterns: Sequence[str], text_format: TextFormat) -> list[Source]:
    """The files that match paths and glob patterns; those of a pattern in alphabetical order.

    Raises:
        ValueError: if a pattern matches no readable file or a file that is not text, or a file is
            matched twice.
    """
    paths: list[str] = []
    for pattern in patterns:
        if os.path.exists(pattern):
            kind = stat.S_IFMT(os.stat(pattern).st_mode)
            files = [pattern] if kind in _READABLE else []
            problem = "it is a folder" if kind == stat.S_IFDIR else "it is a socket or a device"
        else:
            matches = sorted(glob.glob(pattern, recursive=True))
            files = [path for path in matches if os.path.isfile(path)]
            problem = "it matches only folders" if matches else "no such file"
        if not files:
            raise input_error(
                f"Cannot read {pattern}: {problem}. FILE must be a file, a pipe, or a pattern of "
                "files such as 'data/*.jsonl'. Correct the path."
            )
        paths += files
    twice = {path for path in paths if paths.count(path) > 1}
    if twice:
        raise input_error(
            f"An input is given twice: {', '.join(sorted(twice))}. Each file may be given only "
            "once. Remove one of the patterns that match it."
        )
    return [_inspect(path, text_format) for path in paths]


def _inspect(path: str, text_format: TextFormat) -> Source:
    """A file, after a check of its format. A pipe is checked when it is read."""
    if not os.path.isfile(path):
        return Source(path, 0, one_document=False)
    try:
        with open(path, "rb", buffering=0) as raw:
            start, size = _read_start(raw), os.fstat(raw.fileno()).st_size
    except OSError as broken:
        raise _cannot_read(path, broken) from broken
    parsed = _is_json_lines(path, start, text_format)
    whole = text_format.documents == "file" and not parsed and not formats.is_gzip(start)
    return Source(path, size, one_document=whole)


def _is_json_lines(path: str, start: bytes, text_format: TextFormat) -> bool:
    if path.lower().endswith(".gz") and start and not formats.is_gzip(start):
        raise _cannot_read(path, gzip.BadGzipFile("Not a gzipped file"))
    return formats.is_json_lines(
        path,
        formats.decompressed(start),
        form=text_format.form,
        json_key=text_format.json_key,
    )


def _read_start(raw: io.FileIO) -> bytes:
    """The first START_BYTES, which a pipe gives in several reads."""
    start = b""
    while block := raw.read(formats.START_BYTES - len(start)):
        start += block
    return start


class _Stream(io.RawIOBase):
    """A file or pipe whose start was already read; counts the bytes that are read from it."""

    def __init__(self, raw: io.FileIO, start: bytes) -> None:
        self._raw = raw
        self._start = start
        self.count = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        size = min(len(buffer), len(self._start))
        if size:
            buffer[:size] = self._start[:size]
            self._start = self._start[size:]
        else:
            size = self._raw.readinto(buffer) or 0
        self.count += size
        return size


def read_chunks(path: str, text_format: TextFormat, *, in_pieces: bool) -> Iterator[Chunk]:
    """The documents of a file or pipe.

    Args:
        path: the file; decompressed if its content is gzip.
        text_format: how it is read.
        in_pieces: whether long documents of plain text may be cut into pieces.

    Raises:
        ValueError: if it cannot be read, or does not have the format of its name.
    """
    try:
        with open(path, "rb", buffering=0) as raw:
            start = _read_start(raw)
            key = text_format.json_key if _is_json_lines(path, start, text_format) else None
            stream = _Stream(raw, start)
            file = cast(BinaryIO, io.BufferedReader(stream, CHUNK_BYTES))
            if formats.is_gzip(start):
                file = cast(BinaryIO, gzip.GzipFile(fileobj=file))
            if formats.decompressed(start).startswith(formats.UTF8_BOM):
                file.read(len(formats.UTF8_BOM))
            if key is not None:
                documents = _json_lines(path, file)
            else:
                longest = CHUNK_BYTES if in_pieces else sys.maxsize
                documents = _plain_text(file, text_format.documents, longest)
            before = 0
            for batch in _batches(documents):
                before, read = stream.count, stream.count - before
                yield Chunk(path, key, batch, read)
    except (OSError, EOFError, zlib.error) as broken:
        raise _cannot_read(path, broken) from broken


def _cannot_read(path: str, broken: Exception) -> ValueError:
    kind = "a readable gzip file" if path.lower().endswith(".gz") else "a readable file"
    return input_error(
        f"Cannot read {path}: {getattr(broken, 'strerror', None) or broken}. It must be {kind}. "
        "Correct the path, its permissions or the file."
    )


def _json_lines(path: str, file: IO[bytes]) -> Iterator[Piece]:
    """Lines that are not blank, without line endings."""
    number = 0
    while line := file.readline(LONGEST_LINE + 1):
        number += 1
        if len(line) > LONGEST_LINE:
            raise input_error(
                f"{path}:{number} is too long: it has more than {LONGEST_LINE} bytes. A JSON line "
                "may have that many. Divide its text into several lines."
            )
        if line.strip():
            yield Piece(number, line.rstrip(b"\r\n"))


def _plain_text(file: IO[bytes], documents: str, longest: int) -> Iterator[Piece]:
    """Documents, those that are longer than `longest` in pieces."""
    if documents == "file":
        parts = iter(lambda: file.read(CHUNK_BYTES), b"")
        yield from cut(1, parts, longest)
        return
    lines = _lines(file, longest)
    for blank, group in itertools.groupby(lines, key=lambda line: line[2]):
        if blank:
            continue
        if documents == "paragraph":
            first, part, _ = next(group)
            yield from cut(first, itertools.chain([part], (line[1] for line in group)), longest)
        else:
            for number, line in itertools.groupby(group, key=lambda line: line[0]):
                yield from cut(number, (part for _, part, _ in line), longest, strip=b"\r\n")


def _lines(file: IO[bytes], longest: int) -> Iterator[tuple[int, bytes, bool]]:
    """Number of a line, at most `longest` bytes of it, and whether the line is blank."""
    number, starts = 1, True
    while part := file.readline(longest):
        ends = part.endswith(b"\n")
        whole = starts and (ends or len(part) < longest)
        yield number, part, whole and not part.strip()
        number, starts = number + ends, ends


def _batches(documents: Iterable[Piece]) -> Iterator[tuple[Piece, ...]]:
    """Batches of about CHUNK_BYTES; a piece of a longer document by itself."""
    batch: list[Piece] = []
    size = 0
    for document in documents:
        if document.is_part:
            if batch:
                yield tuple(batch)
            yield (document,)
            batch, size = [], 0
            continue
        batch.append(document)
        size += len(document.content)
        if size >= CHUNK_BYTES:
            yield tuple(batch)
            batch, size = [], 0
    if batch:
        yield tuple(batch)
