"""What is written where: scalars for the host's writers, tables for people."""

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_llr.matrices.ids import MatrixId
from megatron_llr.spectrum import record_from_eigenvalues
from megatron_llr.telemetry import plots
from megatron_llr.telemetry.csv_log import CsvLog, files_of
from megatron_llr.telemetry.log_rows import (
    MEASUREMENT_FIELDS,
    RATE_FIELDS,
    ROLE_MEASUREMENT_FIELDS,
)
from megatron_llr.telemetry.observer import MatrixRates, Observer
from megatron_llr.telemetry.read_logs import read_rows
from megatron_llr.telemetry.tables import by_role, role_table
from tests.reference.matrix_ids import by_id, info
from tests.unit.recorder import Recorder

MATRIX = MatrixId.read("block.2.mlp.up")
HEAD = MatrixId("head")
MATRIX_INDEX = {MATRIX: info(MATRIX, "block.2.mlp.fc1")}


def test_tensorboard_and_wandb_get_the_same_scalars() -> None:
    tensorboard, wandb = Recorder(), Recorder()
    observer = Observer(say=print, tensorboard=tensorboard, wandb=wandb)
    rates = {MATRIX: MatrixRates(2.0, 2e-3, 1e-4, 3e-3), HEAD: MatrixRates(5.0, 5e-3, 2e-4)}
    observer.stepped(7, rates)
    assert tensorboard.scalars["llr/multiplier/up/block_002"] == 2.0
    assert tensorboard.scalars["llr/learning_rate/head"] == 5e-3
    assert tensorboard.scalars["llr/effective_learning_rate-by-role/up/max"] == 1e-4
    assert tensorboard.scalars["llr/relative_update/up/block_002"] == 3e-3
    assert tensorboard.scalars["llr/relative_update-by-role/up/mean"] == 3e-3
    assert "llr/relative_update/head" not in tensorboard.scalars
    # They join the row that the host has open, and leave it open.
    assert wandb.rows == {0: {**tensorboard.scalars, "llr/update": 7}}


def test_wandb_drops_neither_the_hosts_values_nor_ours() -> None:
    """The host logs at its iterations, after ours; updates that were skipped do not count here."""
    wandb = Recorder()
    under_way = 0
    observer = Observer(say=print, wandb=wandb, wandb_step=lambda: under_way)
    observer.open(measured_up_to=0, rates_up_to=0)
    observer.measured(1, {}, {MATRIX: 1.0}, MATRIX_INDEX, {})
    update = 0
    for under_way in range(1, 7):
        if under_way > 2:
            update += 1
            observer.stepped(update, {MATRIX: MatrixRates(float(update), 1.0, 1.0)})
            if update % 2:
                observer.measured(update + 1, {}, {MATRIX: 10.0 + update}, MATRIX_INDEX, {})
        wandb.log({"lm loss": 9.0}, under_way)
    assert wandb.dropped == []
    assert [row.get("lm loss") for row in wandb.rows.values()] == [None] + [9.0] * 6
    for values, axis, expected in (
        ("llr/multiplier/up/block_002", "llr/update", [(3, 1, 1), (4, 2, 2), (5, 3, 3), (6, 4, 4)]),
        (
            "llr/target_multiplier/up/block_002",
            "llr/measured_before_update",
            [(0, 1, 1), (3, 2, 11), (5, 4, 13)],
        ),
    ):
        found = [(at, row[axis], row[values]) for at, row in wandb.rows.items() if values in row]
        assert found == expected
        pattern = next(name for name in wandb.axes if values.startswith(name.rstrip("*")))
        assert wandb.axes[pattern] == axis


def test_a_log_that_cannot_be_written_is_a_warning_not_the_end(tmp_path: Path, caplog: Any) -> None:
    observer = Observer(say=print, csv_log=CsvLog(tmp_path / "log"))
    observer.open(measured_up_to=0, rates_up_to=0)
    (tmp_path / "log" / "learning_rates.csv").unlink()
    (tmp_path / "log" / "learning_rates.csv").mkdir()
    observer.stepped(1, {MATRIX: MatrixRates(1.0, 1.0, 1.0)})
    assert "not written" in caplog.text


def test_a_writer_of_the_host_that_breaks_is_a_warning_not_the_end(caplog: Any) -> None:
    """TensorBoard's raises what its thread ran into, W&B's what its server said."""

    class Broken(Recorder):
        def add_scalar(self, tag: str, value: float, step: int) -> None:
            raise OSError("no space left on device")

        def define_metric(self, name: str, step_metric: str | None = None) -> None:
            raise RuntimeError("run is gone")

        def log(
            self, values: dict[str, float], step: int | None = None, commit: bool | None = None
        ) -> None:
            raise RuntimeError("run is gone")

    rates = {MATRIX: MatrixRates(1.0, 1.0, 1.0)}
    Observer(say=print, tensorboard=Broken()).stepped(1, rates)
    observer = Observer(say=print, wandb=Broken())
    observer.open(measured_up_to=0, rates_up_to=0)
    observer.stepped(1, rates)
    assert "llr/multiplier not written: no space left on device" in caplog.text
    assert "llr/learning_rate not written: run is gone" in caplog.text


def write_runs(folder: Path, relative: tuple[float | None, ...]) -> CsvLog:
    csv_log = CsvLog(folder)
    csv_log.open(measured_up_to=0, rates_up_to=0)
    for update, value in enumerate(relative, 1):
        ids = [MatrixId.read(f"block.{b}.mlp.{r}") for b in (0, 1) for r in ("up", "q")]
        rows = [(matrix, 1.0, 1e-3, 1e-4, value, None) for matrix in ids]
        csv_log.write_rates(update, rows)
    return csv_log


def test_relative_updates_are_written_where_they_were_recorded(tmp_path: Path) -> None:
    write_runs(tmp_path, (None, 2.5e-3))
    rows = list(read_rows(tmp_path / "learning_rates.csv"))
    assert [row["relative_update"] for row in rows] == [""] * 4 + ["0.0025"] * 4


def test_a_log_from_before_relative_updates_goes_on(tmp_path: Path) -> None:
    """Its rows stay, with an empty cell; those of other columns and torn ones do not."""
    old = tmp_path / "learning_rates.csv"
    header = ",".join(RATE_FIELDS[:-2])
    old.write_text(f"{header}\n4,head,5.0,0.005,0.0002\n8,head,5.0,0.004,0.0001\n8,{MATRIX},1")
    csv_log = CsvLog(tmp_path)
    csv_log.open(measured_up_to=0, rates_up_to=8)
    csv_log.write_rates(12, [(HEAD, 5.0, 0.003, 0.0001, 2e-3, None)])
    rows = list(read_rows(old))
    assert tuple(rows[0]) == RATE_FIELDS
    kept = [(row["iteration"], row["relative_update"]) for row in rows]
    assert kept == [("4", ""), ("8", ""), ("12", "0.002")]
    old.write_text("iteration,matrix,colour\n4,head,red\n")
    csv_log.open(measured_up_to=0, rates_up_to=8)
    assert list(read_rows(old)) == []


def test_the_figure_of_relative_updates_is_drawn_where_there_are_any(tmp_path: Path) -> None:
    png = tmp_path / "updates.png"
    write_runs(tmp_path / "with", (None, 0.0, 2e-3, 1e-3))
    assert plots.relative_update_lines(tmp_path / "with", png)
    assert png.read_bytes()[:4] == b"\x89PNG"
    png.unlink()
    write_runs(tmp_path / "without", (None, None))
    assert not plots.relative_update_lines(tmp_path / "without", png)
    assert not png.exists()
    (tmp_path / "old").mkdir()
    header = ",".join(RATE_FIELDS[:-2])
    (tmp_path / "old" / "learning_rates.csv").write_text(f"{header}\n4,head,5.0,0.005,0.0002\n")
    assert not plots.relative_update_lines(tmp_path / "old", png)


@pytest.mark.parametrize("by_role", [False, True])
def test_the_exponents_that_set_the_multipliers_are_logged(by_role: bool, tmp_path: Path) -> None:
    """Beside alpha_hill_median, also in a log from before they were; nothing of those not asked."""
    csv_log, recorder = CsvLog(tmp_path, by_role=by_role), Recorder()
    path = files_of(tmp_path, by_role=by_role)[0].path
    names = ROLE_MEASUREMENT_FIELDS if by_role else MEASUREMENT_FIELDS
    old = [name for name in names if not name.startswith(("alpha_ks", "alpha_fix_finger"))]
    path.write_text(f"{','.join(old)}\n1{',' * (len(old) - 1)}\n")
    observer = Observer(say=print, csv_log=csv_log, tensorboard=recorder, by_role=by_role)
    observer.open(measured_up_to=1, rates_up_to=1)
    values = torch.rand(64, generator=torch.Generator().manual_seed(1)).double().sort().values
    record = record_from_eigenvalues(values, estimators=("ks",), method="gram64")
    observer.measured(2, {MATRIX: record}, {MATRIX: 1.0}, MATRIX_INDEX, {MATRIX: values})
    assert recorder.scalars["llr/alpha_ks/up/block_002"] == record.alpha_ks
    assert recorder.scalars["llr/alpha_ks-by-role/up/mean"] == record.alpha_ks
    assert recorder.scalars["llr/alpha_hill_median/up/block_002"] == record.alpha_hill_median
    assert not any("fix_finger" in tag for tag in recorder.scalars)
    before, after = read_rows(path)
    end = "_mean" if by_role else ""
    assert (before["iteration"], before[f"alpha_ks{end}"]) == ("1", "")
    assert float(after[f"alpha_ks{end}"]) == record.alpha_ks
    assert after[f"alpha_fix_finger{end}"] == ""


def test_the_role_table_shows_what_was_not_measured() -> None:
    alphas, factors = by_role({MATRIX: 2.5}), by_role({MATRIX: 1.5, HEAD: 5.0})
    table = role_table({"up": 1, "head": 1}, alphas, factors).splitlines()
    assert table[1].split() == ["up", "1", "2.500", "1.500", "to", "1.500"]
    assert table[2].split() == ["head", "1", "-", "5.000", "to", "5.000"]
    assert table[0].split() == ["role", "matrices", "mean", "alpha_hill_median", "multiplier"]
    assert "  mean alpha_ks  " in role_table({"up": 1, "head": 1}, alphas, factors, "ks")


def test_torchs_writer_gets_all_scalars_of_a_tag_in_one_event(tmp_path: Path) -> None:
    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    writer = tensorboard.SummaryWriter(str(tmp_path))
    stand_in = Recorder()
    rates = by_id({f"block.{n}.mlp.up": MatrixRates(n + 1.0, 1e-3, 1e-4, 3e-3) for n in range(5)})
    for to in (writer, stand_in):
        Observer(say=print, tensorboard=to).stepped(7, rates)
    writer.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    found = {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}
    assert {tag: len(values) for tag, values in found.items()} == dict.fromkeys(found, 1)
    assert {values[0].step for values in found.values()} == {7}
    read = {tag: values[0].value for tag, values in found.items()}
    assert read == pytest.approx(stand_in.scalars, rel=1e-6)
