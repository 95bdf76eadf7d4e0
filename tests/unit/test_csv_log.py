"""The CSV files of a run on a full disk, after their folder was removed, and on resume."""

import resource
from pathlib import Path

import pytest

from megatron_llr.matrices.ids import MatrixId
from megatron_llr.telemetry.csv_log import CsvLog, complete_rows
from megatron_llr.telemetry.log_rows import RATE_FIELDS
from megatron_llr.telemetry.observer import MatrixRates, Observer

MATRICES = [MatrixId.read(f"block.{number}.mlp.up") for number in range(20)]
RATES = {matrix: MatrixRates(1.0, 1e-3, 1e-4) for matrix in MATRICES}


def updates(path: Path) -> list[int]:
    """The updates in a file, one per row; every line is a row."""
    rows = [row for _, row in complete_rows(path)]
    assert path.read_bytes().endswith(b"\n")
    assert path.read_text().splitlines()[0] == ",".join(RATE_FIELDS)
    return [int(row["iteration"]) for row in rows if row is not None or pytest.fail("no row")]


def test_a_full_disk_leaves_whole_rows_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    observer, path = Observer(say=print, csv_log=CsvLog(tmp_path)), tmp_path / "learning_rates.csv"
    observer.open(measured_up_to=0, rates_up_to=0)
    observer.stepped(1, RATES)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # In the middle of a row of update 2.
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 130, limits[1]))
    try:
        observer.stepped(2, RATES)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert f"{tmp_path} not written: " in caplog.text
    assert updates(path) == [1] * 20
    observer.stepped(3, RATES)
    assert updates(path) == [1] * 20 + [3] * 20


@pytest.mark.parametrize("how", ["folder", "file", "emptied"])
def test_removed_files_begin_again_and_are_mentioned(
    how: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "a" / "log"
    observer, path = Observer(say=print, csv_log=CsvLog(folder)), folder / "learning_rates.csv"
    observer.open(measured_up_to=0, rates_up_to=0)
    observer.stepped(1, RATES)
    if how == "emptied":
        path.write_text("")
    else:
        path.unlink()
    if how == "folder":
        (folder / "measurements.csv").unlink()
        folder.rmdir()
    observer.stepped(2, RATES)
    observer.stepped(3, RATES)
    assert caplog.text.count(f"{path} was removed or emptied") == 1
    assert updates(path) == [2] * 20 + [3] * 20
    # What a resumed run finds is a log as any other.
    CsvLog(folder).open(measured_up_to=3, rates_up_to=2)
    assert updates(path) == [2] * 20


def test_a_resumed_run_says_that_its_log_is_gone(tmp_path: Path) -> None:
    said: list[str] = []
    for resumed in (True, True, False):
        observer = Observer(say=said.append, csv_log=CsvLog(tmp_path / "log"))
        observer.open(measured_up_to=6, rates_up_to=5, resumed=resumed)
    # Only the first one: the second continues what the first began.
    begins = "has no CSV files of this run: they begin at update 6, and earlier rows are lost"
    assert said == [f"{tmp_path / 'log'} {begins}"]
    Observer(say=said.append, csv_log=CsvLog(tmp_path / "new")).open(
        measured_up_to=5, rates_up_to=5
    )
    assert len(said) == 1


def test_damaged_rows_are_dropped_on_resume(tmp_path: Path) -> None:
    """Blocks of zeros after a crash of the machine, lines of binary data, an open quote."""
    path = tmp_path / "learning_rates.csv"
    header, row = ",".join(RATE_FIELDS), "{},block.0.mlp.up,1.0,0.1,0.1,,"
    good = [row.format(number).encode() for number in (1, 2, 3)]
    bad = [b"\0" * 70_000, b"\xff\xfe,1", b'2,"block', b"2,block.0.mlp.up,1.0,0.1,0.1,,,", b"x" * 9]
    lines = [header.encode(), good[0], *bad, good[1], b"", good[2]]
    path.write_bytes(b"\n".join(lines) + b"\n4,block.0.mlp.up,1.0,0.1,0.1,,0.12")
    CsvLog(tmp_path).open(measured_up_to=9, rates_up_to=9)
    assert updates(path) == [1, 2, 3]
