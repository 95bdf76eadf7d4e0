"""Which format a file has, by its name and its first bytes: JSON lines, plain text, or neither."""

import json
import re
import zlib

from megatron_llr.errors import input_error

FORMATS = ("auto", "jsonl", "text")

# Bytes at the start of a file that decide its format.
START_BYTES = 1 << 13

UTF8_BOM = b"\xef\xbb\xbf"

# First bytes of files that are not UTF-8 text, and what to do with them. Text cannot start like
# this. UTF-32 is before UTF-16, whose mark it starts with.
_NOT_TEXT = {
    "gzip": (rb"\x1f\x8b\x08", "It is compressed twice: decompress it once (gzip -d)"),
    "bzip2": (rb"BZh[1-9](1AY&SY|\x17rE8P\x90)", "Decompress it first (bzip2 -d)"),
    "xz": (rb"\xfd7zXZ\0", "Decompress it first (xz -d)"),
    "zstd": (rb"\x28\xb5\x2f\xfd", "Decompress it first (zstd -d)"),
    "lz4": (rb"\x04\x22\x4d\x18", "Decompress it first (lz4 -d)"),
    "zip": (rb"PK(\x03\x04|\x05\x06)", "Unpack it first (unzip)"),
    "tar": (rb"(?s).{257}ustar", "Unpack it first (tar -xf)"),
    "Parquet": (rb"PAR1\x15", "Write its texts as JSON lines first"),
    "Arrow": (rb"ARROW1\0\0|\xff\xff\xff\xff", "Write its texts as JSON lines first"),
    "PDF": (rb"%PDF-\d", "Extract its text first (pdftotext)"),
    "UTF-32": (rb"\xff\xfe\0\0|\0\0\xfe\xff", "Convert it first (iconv -f UTF-32 -t UTF-8)"),
    "UTF-16": (rb"\xff\xfe|\xfe\xff", "Convert it first (iconv -f UTF-16 -t UTF-8)"),
}

_JSON_LINES_NAMES = (".jsonl", ".ndjson", ".json")
_TEXT_NAMES = (".txt", ".text")
_TABLE_NAMES = (".csv", ".tsv")

_KEY = rb'"(?:[^"\\]|\\.)*"\s*:'
_OBJECT_START = re.compile(rb"\{[ \t]*" + _KEY)
_OBJECT_OR_ARRAY_START = re.compile(rb"(?:\[\s*)?\{\s*" + _KEY)


def is_gzip(start: bytes) -> bool:
    """Whether a file that starts with these bytes is compressed by gzip."""
    return start.startswith(b"\x1f\x8b\x08")


def decompressed(start: bytes) -> bytes:
    """At most START_BYTES of the content of a file that starts with these bytes."""
    if not is_gzip(start):
        return start
    try:
        return zlib.decompressobj(wbits=31).decompress(start, START_BYTES)
    except zlib.error:
        return b""  # reading the file reports it


def is_json_lines(path: str, content: bytes, *, form: str, json_key: str) -> bool:
    """Whether a file is JSON lines (otherwise plain text).

    With the format `auto` the name decides, and where it does not say, the first line: JSON lines
    if that is a JSON object.

    Args:
        path: the file.
        content: the start of the file, decompressed; all of it if shorter than START_BYTES.
        form: one of FORMATS.
        json_key: key of the text in JSON lines.

    Raises:
        ValueError: if it is neither, or if name and content contradict each other.
    """
    for name, (signature, remedy) in _NOT_TEXT.items():
        if re.match(signature, content):
            raise input_error(
                f"{path} is not text: its first bytes are those of {name}. It must be JSON lines "
                f"or plain text in UTF-8, optionally gzipped. {remedy}."
            )
    if form != "auto":
        return form == "jsonl"
    if b"\0" in content:
        raise input_error(
            f"{path} is not text: it has a zero byte. It must be JSON lines or plain text in "
            "UTF-8, optionally gzipped. Convert it first, or set --format text to take its bytes "
            "as they are."
        )
    name = path.lower().removesuffix(".gz")
    if name.endswith(_JSON_LINES_NAMES):
        return True
    if name.endswith(_TABLE_NAMES):
        raise input_error(
            f"{path} has the name of a table. It must be JSON lines or plain text. Write its texts "
            "as JSON lines first, or set --format text to take its lines as they are."
        )
    text = content.removeprefix(UTF8_BOM).lstrip()
    objects = _starts_with_object_line(text, complete=len(content) < START_BYTES)
    if name.endswith(_TEXT_NAMES):
        first_line = text.split(b"\n", 1)[0]
        if objects and re.search(rb'"%b"\s*:' % re.escape(json_key.encode()), first_line):
            raise input_error(
                f"{path} has the name of plain text, but its first line is a JSON object with the "
                f"key {json_key!r}. It must be one or the other. Set --format jsonl to take the "
                "text of each line, or --format text to take the lines as they are."
            )
        return False
    if not objects and _OBJECT_OR_ARRAY_START.match(text):
        raise input_error(
            f"{path} starts like JSON, but its first line is not a JSON object. It must be JSON "
            "lines or plain text. Write one object per line (jq -c), or set --format text to take "
            "it as it is."
        )
    return objects


def _starts_with_object_line(text: bytes, *, complete: bool) -> bool:
    """Whether the first line is a JSON object.

    Args:
        text: the start of a file, from its first character that is not blank.
        complete: whether that is the whole file.
    """
    line, newline, _ = text.partition(b"\n")
    if not (newline or complete):
        return bool(_OBJECT_START.match(line))
    try:
        return line.startswith(b"{") and isinstance(json.loads(line.decode()), dict)
    except (ValueError, RecursionError):
        return False
