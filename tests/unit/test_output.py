"""Output files and folders are complete or absent."""

from pathlib import Path

import pytest

from megatron_llr.output import and_more, replaced_file, require_space, staged_folder


def test_a_file_is_replaced_only_if_the_block_succeeds(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    with replaced_file(path) as partial:
        partial.write_text("old")
        assert not path.exists()
    with pytest.raises(KeyboardInterrupt), replaced_file(path) as partial:  # noqa: PT012
        assert partial.suffix == ".csv"
        partial.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert [each.name for each in tmp_path.iterdir()] == ["table.csv"]


def test_a_staged_folder_appears_only_if_the_block_succeeds(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "out"
    with pytest.raises(KeyboardInterrupt), staged_folder(target) as partial:  # noqa: PT012
        (partial / "half").touch()
        raise KeyboardInterrupt
    assert list(target.parent.iterdir()) == []
    with staged_folder(target) as partial:
        (partial / "file").touch()
    assert [path.name for path in target.iterdir()] == ["file"]
    with pytest.raises(ValueError, match=r"out already exists.*new path.*another name or remove"):
        staged_folder(target).__enter__()


def test_errors_name_sizes(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"GB free, but the output needs at least 1e\+06|1000000000"
    ):
        require_space(tmp_path, 10**18)
    assert and_more(["a"]) == "a"
    assert and_more(["a", "b", "c"]) == "a and 2 more"
