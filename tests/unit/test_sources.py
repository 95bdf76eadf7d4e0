"""Which files are accepted as text."""

import bz2
import gzip
import lzma
from pathlib import Path

import pytest

from megatron_llr.tools.preprocess.sources import expand, read_chunks

NOT_TEXT = {
    "in.txt": ("gzip", gzip.compress(b"x")),
    "in.bz2": ("bzip2", bz2.compress(b"x", 3)),
    "none.txt.bz2": ("bzip2", bz2.compress(b"")),
    "in.jsonl.xz": ("xz", lzma.compress(b"x")),
    "in.zst": ("zstd", b"\x28\xb5\x2f\xfd\x04\x58\x71\0\0"),
    "in.parquet": ("Parquet", b"PAR1\x15\x04\x15"),
}


@pytest.mark.parametrize("name", NOT_TEXT)
def test_files_that_are_not_text_are_refused_before_any_is_read(name: str, tmp_path: Path) -> None:
    form, content = NOT_TEXT[name]
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(
        ValueError,
        match=f"{name} is not text: its first bytes are those of {form}.*must be JSON lines",
    ):
        expand([str(tmp_path / "good.txt"), str(tmp_path / name)])


def test_similar_text_and_gzip_with_its_suffix_are_accepted(tmp_path: Path) -> None:
    contents = {"a.txt": b"BZh9 is a name", "b.txt": b"PAR1 too", "c.gz": gzip.compress(b"x")}
    for name, content in {**contents, "d.txt": b""}.items():
        (tmp_path / name).write_bytes(content)
    files = expand([str(tmp_path / "*")])
    assert [Path(path).name for path in files] == ["a.txt", "b.txt", "c.gz", "d.txt"]


def test_damaged_gzip_is_an_error_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "in.txt.gz"
    path.write_bytes(gzip.compress(b"x")[:10] + b"\xff" * 50)
    with pytest.raises(ValueError, match=r"in.txt.gz: Error -3 .*must be a readable gzip file"):
        list(read_chunks(str(path), json_key=None, documents="file"))
