"""Arbitrary CSV files and events of a run: a result or one clear error."""

import contextlib
import io
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.tensorboard import SummaryWriter

from megatron_llr.telemetry import log_rows
from megatron_llr.telemetry.csv_log import CsvLog, files_of
from megatron_llr.telemetry.read_logs import last_measurement, last_role_table, rates_by_role
from megatron_llr.tools.compare.effective_rate import effective_rate_of
from megatron_llr.tools.compare.planning import measured_roles
from megatron_llr.tools.compare.results import losses
from megatron_llr.tools.report import cli

MEMORY = 50 * 2**20
CELLS = st.one_of(
    st.sampled_from(
        [
            *"0 1 8 1.5 -1 nan inf -inf 1e308 1e101 1e-320 ² ١ 1_0 block.0.mlp.up head".split(),
            *("mtp.0", "q", "up", "", " ", "$x$", "_up", '"', "'", "\0", "9" * 5000),
            *("block.²", f"block.{'9' * 5000}.q"),
        ]
    ),
    st.text(st.characters(exclude_characters="\r\n,"), max_size=6),
)
FIELDS = {
    (False, 0): log_rows.MEASUREMENT_FIELDS,
    (False, 1): log_rows.RATE_FIELDS,
    (True, 0): log_rows.ROLE_MEASUREMENT_FIELDS,
    (True, 1): log_rows.ROLE_RATE_FIELDS,
}
VALID = {"iteration": "1", "matrix": "block.0.mlp.up", "block": "0", "role": "up", "matrices": "2"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "run"


def read(folder: Path) -> None:
    """Everything that reads these files; an error names the file and, for a row, the line."""
    tracemalloc.start()
    readers = (
        lambda: last_role_table(last_measurement(folder)),
        lambda: rates_by_role(folder, "learning_rate"),
        lambda: effective_rate_of(folder),
        lambda: measured_roles(folder),
    )
    messages = []
    for reader in readers:
        try:
            reader()
        except (ValueError, FileNotFoundError) as error:
            messages.append(str(error))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < MEMORY
    for message in messages:
        assert str(folder) in message
        assert len(message) < 1000
        assert "\n" not in message


def write(folder: Path, *, by_role: bool, which: int, content: bytes) -> None:
    """One file of a run, and nothing else."""
    folder.mkdir(exist_ok=True)
    for path in folder.iterdir():
        path.unlink()
    files_of(folder, by_role=by_role)[which].path.write_bytes(content)


@given(
    by_role=st.booleans(),
    which=st.sampled_from((0, 1)),
    cells=st.lists(CELLS, min_size=25, max_size=25),
    changed=st.sets(st.integers(0, 24), min_size=1, max_size=3),
)
def test_any_cells(
    by_role: bool, which: int, cells: list[str], changed: set[int], folder: Path
) -> None:
    fields = FIELDS[by_role, which]
    row = [VALID.get(name, "1.5") for name in fields]
    for index in changed:
        row[index % len(row)] = cells[index]
    text = f"{','.join(fields)}\r\n{','.join(row)}\r\n"
    write(folder, by_role=by_role, which=which, content=text.encode())
    read(folder)


@given(
    by_role=st.booleans(),
    which=st.sampled_from((0, 1)),
    content=st.binary(max_size=200)
    | st.text("iteration,matrix\r\n12\"'\0 é", max_size=60).map(str.encode),
    with_header=st.booleans(),
)
def test_any_bytes(
    by_role: bool, which: int, content: bytes, with_header: bool, folder: Path
) -> None:
    header = ",".join(FIELDS[by_role, which]).encode() + b"\n" if with_header else b""
    write(folder, by_role=by_role, which=which, content=header + content)
    read(folder)
    # A resumed run keeps what are rows, whatever else is there.
    CsvLog(folder, by_role=by_role).open(measured_up_to=9, rates_up_to=9)
    read(folder)


@given(end=st.integers(1, 60))
def test_a_row_that_is_being_written_is_left_out(end: int, folder: Path) -> None:
    """Also if the last cell is torn, which leaves the number of cells right."""
    header = ",".join(log_rows.RATE_FIELDS)
    rows = [f"{n},block.0.mlp.up,1.0,0.125,0.125,0.125,0.1234\r\n" for n in (1, 2)]
    whole = f"{header}\r\n{rows[0]}"
    write(
        folder,
        by_role=False,
        which=1,
        content=(whole + rows[1][: -min(end, len(rows[1]))]).encode(),
    )
    assert list(rates_by_role(folder, "learning_rate")["up"]) == [1]
    CsvLog(folder).open(measured_up_to=2, rates_up_to=2)
    assert (folder / "learning_rates.csv").read_text() == whole.replace("\r\n", "\n")


def test_a_line_without_an_end_takes_no_memory(folder: Path) -> None:
    write(folder, by_role=False, which=0, content=b"iteration,matrix\n" + b"x" * (60 * 2**20))
    read(folder)


@pytest.mark.parametrize(
    ("which", "cells", "named"),
    [
        (0, {"matrix": "$x$"}, "line 2 has matrix: '$x$'"),
        (0, {"iteration": ""}, "line 2 has iteration: ''"),
        (0, {"target_multiplier": "1e101"}, "line 2 has target_multiplier: '1e101'"),
        (1, {"learning_rate": "fast"}, "line 2 has learning_rate: 'fast'"),
        (1, {"learning_rate": "1,2"}, "line 2 is not a row"),
    ],
)
def test_report_names_the_line(
    which: int,
    cells: dict[str, str],
    named: str,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for index in (0, 1):
        fields = FIELDS[False, index]
        row = {**dict.fromkeys(fields, "1.5"), **VALID, **(cells if index == which else {})}
        content = f"{','.join(fields)}\n{','.join(row[name] for name in fields)}\n"
        if index == 0:
            write(folder, by_role=False, which=0, content=content.encode())
        else:
            files_of(folder, by_role=False)[1].path.write_text(content)
    assert cli.main([str(folder)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert named in line


@pytest.mark.parametrize(
    ("by_role", "value"), [(False, "1e100"), (False, "inf"), (True, "-1e100"), (True, "1e-320")]
)
def test_figures_of_extreme_values(by_role: bool, value: str, folder: Path) -> None:
    for index in (0, 1):
        fields = FIELDS[by_role, index]
        row = {**dict.fromkeys(fields, value), **VALID, "iteration": "9" * 18}
        content = f"{','.join(fields)}\n{','.join(row[name] for name in fields)}\n"
        if index == 0:
            write(folder, by_role=by_role, which=0, content=content.encode())
        else:
            files_of(folder, by_role=by_role)[1].path.write_text(content)
    with contextlib.redirect_stdout(io.StringIO()):
        assert cli.main([str(folder)]) == 0


@given(place=st.integers(0, 400), inserted=st.binary(min_size=1, max_size=8), cut=st.booleans())
def test_any_bytes_of_events(place: int, inserted: bytes, cut: bool, folder: Path) -> None:
    events = folder.parent / "events"
    if not events.exists():
        with SummaryWriter(events / "tensorboard") as writer:
            for step in range(3):
                writer.add_scalar("lm loss validation", 1.0, step)
    (path,) = (events / "tensorboard").iterdir()
    before = path.read_bytes()
    rest = b"" if cut else before[place + len(inserted) :]
    path.write_bytes(before[:place] + inserted + rest)
    message = str(path)
    try:
        losses(events)
    except ValueError as error:
        message = str(error)
    finally:
        path.write_bytes(before)
    assert str(path) in message
