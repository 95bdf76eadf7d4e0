"""Which files are accepted as text, which are JSON lines, and how they are cut into documents."""

import bz2
import gzip
import io
import itertools
import json
import lzma
import re
import shutil
import subprocess
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_llr.tools.preprocess import pieces, sources
from megatron_llr.tools.preprocess.pieces import Piece
from megatron_llr.tools.preprocess.sources import TextFormat, expand, read_chunks

AUTO = TextFormat()


def archive(kind: str) -> bytes:
    file = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(file, "w") as packed:
            packed.writestr("a.txt", "text")
    else:
        with tarfile.open(fileobj=file, mode="w") as tar:
            tar.addfile(tarfile.TarInfo("a.txt"), io.BytesIO())
    return file.getvalue()


NOT_TEXT = {
    "in.txt.gz": ("gzip", gzip.compress(gzip.compress(b"x"))),
    "in.bz2": ("bzip2", bz2.compress(b"x", 3)),
    "none.txt.bz2": ("bzip2", bz2.compress(b"")),
    "in.jsonl.xz": ("xz", lzma.compress(b"x")),
    "in.zst": ("zstd", b"\x28\xb5\x2f\xfd\x04\x58\x71\0\0"),
    "in.lz4": ("lz4", b"\x04\x22\x4d\x18\x64\x40\xa7"),
    "in.txt": ("zip", archive("zip")),
    "in.tar": ("tar", archive("tar")),
    "in.tgz": ("tar", gzip.compress(archive("tar"))),
    "in.parquet": ("Parquet", b"PAR1\x15\x04\x15"),
    "in.arrow": ("Arrow", b"\xff\xff\xff\xff\x10\0\0\0"),
    "in.feather": ("Arrow", b"ARROW1\0\0\xff"),
    "in.pdf": ("PDF", b"%PDF-1.7\n"),
    "utf16.jsonl": ("UTF-16", '{"text": "x"}'.encode("utf-16")),
    "utf32.txt": ("UTF-32", "text".encode("utf-32")),
}


@pytest.mark.parametrize("form", ["auto", "jsonl", "text"])
@pytest.mark.parametrize("name", NOT_TEXT)
def test_files_that_are_not_text_are_refused_before_any_is_read(
    name: str, form: str, tmp_path: Path
) -> None:
    kind, content = NOT_TEXT[name]
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(
        ValueError,
        match=f"{name} is not text: its first bytes are those of {kind}.*must be JSON lines",
    ):
        expand([str(tmp_path / "good.txt"), str(tmp_path / name)], TextFormat(form))


def test_other_binary_files_are_refused_unless_they_are_taken_as_they_are(tmp_path: Path) -> None:
    for name, content in {"a": b"x\0y", "b.txt": "text".encode("utf-16-le")}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} is not text: it has a zero byte.*--format"):
            expand([str(tmp_path / name)], AUTO)
        assert texts(tmp_path / name, TextFormat("text")) == [content]


def test_similar_text_and_gzip_are_accepted(tmp_path: Path) -> None:
    contents = {"a.txt": b"BZh9 is a name", "b.txt": b"PAR1 too", "c.gz": gzip.compress(b"x")}
    contents |= {"d.txt": b"", "e.gz": b"", "f": gzip.compress(b"PK: a wrong name")}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    files = expand([str(tmp_path / "*")], AUTO)
    assert [Path(source.path).name for source in files] == sorted(contents)
    assert texts(tmp_path / "f", AUTO) == [b"PK: a wrong name"]


def test_damaged_gzip_is_an_error_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "in.txt.gz"
    path.write_bytes(gzip.compress(b"x")[:10] + b"\xff" * 50)
    with pytest.raises(ValueError, match=r"in.txt.gz: Error -3 .*must be a readable gzip file"):
        texts(path, AUTO)


OBJECT = b'{"text": "hi"}\n{"text": "yo"}\n'
LONG_OBJECT = json.dumps({"id": 1, "text": "x" * 20_000}).encode() + b"\n"

JSON_LINES = {
    "c.jsonl": OBJECT,
    "c.ndjson": OBJECT,
    "C.JSONL": OBJECT,
    "wiki_00": OBJECT,
    "c.jsonl.1": OBJECT,
    "c.jsonl.bak": b"\n\n" + OBJECT,
    "bom": b"\xef\xbb\xbf" + OBJECT,
    "other_key": b'{"content": "hi"}',
    "long": LONG_OBJECT,
}
PLAIN_TEXT = {
    "c.txt": b'{"content": "hi"}\n',
    "C.TXT": b"text",
    "c.md": b"{text} in braces",
    "source": b"{'a': 1}\n",
    "README": b"[link] text",
    "empty": b"",
}
# Name: content and what the error says.
UNDECIDED = {
    "c.txt": (OBJECT, "first line is a JSON object with the key 'text'.*--format jsonl"),
    "long.text": (LONG_OBJECT, "first line is a JSON object with the key 'text'.*--format jsonl"),
    "array": (b'[{"text": "hi"},\n {"text": "yo"}]', "starts like JSON, but its first line.*jq -c"),
    "pretty": (b'{\n  "text": "hi"\n}', "starts like JSON, but its first line.*--format text"),
    "c.csv": (b"id,text\n1,hi\n", "name of a table.*--format text"),
    "c.TSV": (b"id\ttext\n1\thi\n", "name of a table.*--format text"),
}


@pytest.mark.parametrize("gz", [False, True])
@pytest.mark.parametrize("name", [*JSON_LINES, *PLAIN_TEXT])
def test_the_name_or_else_the_content_decides(name: str, gz: bool, tmp_path: Path) -> None:
    content = JSON_LINES[name] if name in JSON_LINES else PLAIN_TEXT[name]
    path = tmp_path / (f"{name}.gz" if gz else name)
    path.write_bytes(gzip.compress(content) if gz else content)
    expand([str(path)], AUTO)
    (key,) = {chunk.json_key for chunk in read_chunks(str(path), AUTO, in_pieces=True)}
    assert key == ("text" if name in JSON_LINES else None)


@pytest.mark.parametrize("gz", [False, True])
@pytest.mark.parametrize("name", UNDECIDED)
def test_a_contradiction_is_refused_unless_the_format_is_given(
    name: str, gz: bool, tmp_path: Path
) -> None:
    content, message = UNDECIDED[name]
    path = tmp_path / (f"{name}.gz" if gz else name)
    path.write_bytes(gzip.compress(content) if gz else content)
    with pytest.raises(ValueError, match=f"{path.name} .*{message}"):
        expand([str(path)], AUTO)
    assert texts(path, TextFormat("text")) == [content]
    if "--format jsonl" in message:
        assert texts(path, TextFormat("jsonl"))


@pytest.mark.parametrize("name", NOT_TEXT)
def test_the_remedies_work(name: str, tmp_path: Path) -> None:
    """The command that the error names turns the file into one that is accepted."""
    path = tmp_path / name
    path.write_bytes(NOT_TEXT[name][1])
    with pytest.raises(ValueError, match="is not text") as refused:
        expand([str(path)], AUTO)
    remedy = re.search(r"\(([a-z0-9]+)([^)]*)\)\.$", str(refused.value))
    if remedy is None or shutil.which(remedy[1]) is None:
        pytest.skip("no command, or it is not installed")
    if NOT_TEXT[name][1] in (NOT_TEXT["in.zst"][1], NOT_TEXT["in.lz4"][1]):
        pytest.skip("only the start of a file")
    content = gzip.decompress(path.read_bytes()) if name.endswith("gz") else path.read_bytes()
    if remedy[1] in ("unzip", "tar"):
        (tmp_path / "packed").write_bytes(content)
        command = [remedy[1], *remedy[2].split(), str(tmp_path / "packed")]
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
        expand([str(tmp_path / "a.txt")], AUTO)
    else:
        command = [remedy[1], *remedy[2].split()]
        done = subprocess.run(command, input=content, check=True, capture_output=True)
        (tmp_path / "out").write_bytes(done.stdout)
        expand([str(tmp_path / "out")], AUTO)


def test_a_byte_order_mark_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_bytes(b"\xef\xbb\xbftext")
    (tmp_path / "in.jsonl").write_bytes(b"\xef\xbb\xbf" + OBJECT)
    assert texts(tmp_path / "in.txt", AUTO) == [b"text"]
    assert texts(tmp_path / "in.jsonl", AUTO) == [b"hi", b"yo"]


BAD_LINES = {
    "nested too deeply": b'{"text": "x", "m": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "unpaired surrogate": b'{"text": "\\ud800"}',
    "is not JSON": b'{"text": "no end',
    "is not JSON: 'utf-8' codec": b'{"text": "\xff"}',
    "has a number there": b'{"text": 3}',
    "has null there": b'{"text": null}',
    "has an array": b"[1]",
    "has a string": b'"text"',
    "has no keys": b"{}",
    "has the keys 'a'": b'{"a": "x"}',
}


@pytest.mark.parametrize("message", BAD_LINES)
def test_a_bad_line_is_named(message: str, tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'{"text": "x"}\n\n' + BAD_LINES[message] + b"\n")
    with pytest.raises(ValueError, match=rf"^megatron_llr: .*in.jsonl:3 .*{message}"):
        texts(path, AUTO)


def test_numbers_of_any_length_are_skipped(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text(f'{{"n": {"9" * 10_000}, "text": "x"}}')
    assert texts(tmp_path / "in.jsonl", AUTO) == [b"x"]


def test_a_line_that_is_too_long_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "LONGEST_LINE", 100)
    (tmp_path / "in.jsonl").write_bytes(OBJECT + LONG_OBJECT)
    with pytest.raises(ValueError, match=r"in.jsonl:3 is too long: it has more than 100 bytes"):
        texts(tmp_path / "in.jsonl", AUTO)


def texts(path: Path, text_format: TextFormat) -> list[bytes]:
    """All documents; pieces are joined."""
    documents: list[bytes] = []
    for chunk in read_chunks(str(path), text_format, in_pieces=True):
        if not (chunk.documents[0].is_part and chunk.documents[0].before):
            documents += chunk.texts() if not chunk.documents[0].is_part else [b""]
        if chunk.documents[0].is_part:
            documents[-1] += chunk.documents[0].own
    return documents


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "CHUNK_BYTES", 20)
    monkeypatch.setattr(pieces, "PIECE_BYTES", 20)
    monkeypatch.setattr(pieces, "CONTEXT_BYTES", 8)


PLAIN = st.lists(
    st.one_of(st.sampled_from(["\n", "\r\n", " ", "\n\n", "x" * 50]), st.text(max_size=30))
).map(lambda parts: "".join(parts).encode("utf-8", "replace"))


@pytest.mark.usefixtures("small_pieces")
@given(content=PLAIN, documents=st.sampled_from(sources.DOCUMENTS))
def test_pieces_join_to_the_documents(
    content: bytes, documents: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "pieces.txt"
    path.write_bytes(content)
    text_format = TextFormat("text", documents=documents)
    chunks = list(read_chunks(str(path), text_format, in_pieces=True))
    expected = list(read_chunks(str(path), text_format, in_pieces=False))
    # A blank part of a line longer than a piece is not known to be a blank line.
    if not any(not line.strip() and len(line) >= 20 for line in content.splitlines(True)):
        assert texts(path, text_format) == [text for chunk in expected for text in chunk.texts()]
    if chunks and documents == "file":
        assert sum(chunk.read for chunk in chunks) == len(content)
    assert_cuts_agree([chunk.documents for chunk in chunks])
    if documents == "file":
        position = 0
        for piece in (piece for chunk in chunks for piece in chunk.documents):
            start = position - piece.before
            assert content[start:].startswith(piece.content)
            assert piece.line == 1 + content.count(b"\n", 0, start)
            position += len(piece.own)


def assert_cuts_agree(chunks: list[tuple[Piece, ...]]) -> None:
    """Neighbors share their context, which has a minimum size; characters are whole."""
    for before, after in itertools.pairwise(chunks):
        piece, following = before[-1], after[0]
        assert (piece.after > 0) == (following.before > 0)
        if piece.after:
            assert piece.after >= 5
            assert following.before >= 8
            end = len(piece.content) - piece.after
            assert piece.content[:end].endswith(following.content[: following.before])
            assert following.own.startswith(piece.content[end:][: len(following.own)])
    for piece in itertools.chain.from_iterable(chunks):
        piece.content.decode()
        # Context on both sides and the piece.
        assert len(piece.content) <= 11 + 20 + 8


ANY_JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=8,
)


def damaged(line: bytes) -> st.SearchStrategy[bytes]:
    """The line, or with a byte changed, removed or repeated."""
    position = st.integers(0, max(0, len(line) - 1))
    return st.one_of(
        st.just(line),
        st.builds(lambda at, byte: line[:at] + byte + line[at + 1 :], position, st.binary()),
        st.builds(lambda at, times: line[:at] + line[at:] * times, position, st.integers(0, 3)),
    )


LINES = st.lists(
    st.one_of(
        st.binary(max_size=60),
        (ANY_JSON | st.fixed_dictionaries({"text": ANY_JSON})).flatmap(
            lambda value: damaged(json.dumps(value).encode())
        ),
    ),
    max_size=6,
).map(b"\n".join)


@given(content=LINES, gz=st.booleans(), form=st.sampled_from(["auto", "jsonl"]))
def test_any_bytes_are_texts_or_one_error(
    content: bytes, gz: bool, form: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The texts are those of the standard parser, and an error names the file."""
    path = tmp_path_factory.getbasetemp() / "fuzz"
    path.write_bytes(gzip.compress(content) if gz else content)
    text_format = TextFormat(form)
    try:
        expand([str(path)], text_format)
        chunks = list(read_chunks(str(path), text_format, in_pieces=True))
        read = [text for chunk in chunks for text in chunk.texts()]
    except ValueError as broken:
        assert_one_line(broken, path)
        return
    if all(chunk.json_key for chunk in chunks):
        lines = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
        parsed = (json.loads(line) for line in lines if line.strip())
        assert read == [value["text"].encode() for value in parsed]


def assert_one_line(error: ValueError, path: Path) -> None:
    (line,) = str(error).splitlines()
    assert line.startswith("megatron_llr: ")
    assert str(path) in line


@given(start=st.binary(max_size=40), compressed=st.binary(max_size=200))
def test_any_damaged_gzip_is_text_or_one_error(
    start: bytes, compressed: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.gz"
    whole = gzip.compress(start * 50)
    path.write_bytes(whole[: len(whole) // 2] + compressed)
    try:
        texts(path, TextFormat("text"))
    except ValueError as broken:
        assert_one_line(broken, path)
