"""What is written where: scalars for the host's writers, tables for people."""

from pathlib import Path
from typing import Any

from megatron_llr.observe import plots
from megatron_llr.observe.csv_log import RATE_FIELDS, CsvLog
from megatron_llr.observe.observer import MatrixRates, Observer
from megatron_llr.observe.summary import role_table
from megatron_llr.records import MatrixInfo

MATRIX = "block.2.mlp.up"
DIRECTORY = {MATRIX: MatrixInfo(MATRIX, "block.2.mlp.fc1", 64, 64, ((0,),), False)}


class Recorder:
    """Stands for the host's writers, which have these methods."""

    def __init__(self) -> None:
        self.scalars: dict[str, float] = {}
        self.logged: list[tuple[dict[str, float], int]] = []

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self.scalars[tag] = value

    def log(self, values: dict[str, float], step: int) -> None:
        self.logged.append((values, step))


def test_tensorboard_and_wandb_get_the_same_scalars() -> None:
    tensorboard, wandb = Recorder(), Recorder()
    observer = Observer(say=print, tensorboard=tensorboard, wandb=wandb)
    rates = {MATRIX: MatrixRates(2.0, 2e-3, 1e-4, 3e-3), "head": MatrixRates(5.0, 5e-3, 2e-4)}
    observer.stepped(7, rates)
    assert tensorboard.scalars["llr/multiplier/up/block_002"] == 2.0
    assert tensorboard.scalars["llr/learning_rate/head"] == 5e-3
    assert tensorboard.scalars["llr/effective_learning_rate-by-role/up/max"] == 1e-4
    assert tensorboard.scalars["llr/relative_update/up/block_002"] == 3e-3
    assert tensorboard.scalars["llr/relative_update-by-role/up/mean"] == 3e-3
    assert "llr/relative_update/head" not in tensorboard.scalars
    logged: dict[str, float] = {}
    for values, step in wandb.logged:
        assert step == 7
        logged.update(values)
    assert logged == tensorboard.scalars


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

        def log(self, values: dict[str, float], step: int) -> None:
            raise RuntimeError("run is gone")

    rates = {MATRIX: MatrixRates(1.0, 1.0, 1.0)}
    Observer(say=print, tensorboard=Broken()).stepped(1, rates)
    Observer(say=print, wandb=Broken()).stepped(1, rates)
    assert "llr/multiplier not written: no space left on device" in caplog.text
    assert "llr/learning_rate not written: run is gone" in caplog.text


def write_runs(folder: Path, relative: tuple[float | None, ...]) -> CsvLog:
    csv_log = CsvLog(folder)
    csv_log.open(measured_up_to=0, rates_up_to=0)
    for update, value in enumerate(relative, 1):
        rows = [(f"block.{b}.mlp.{r}", 1.0, 1e-3, 1e-4, value) for b in (0, 1) for r in ("up", "q")]
        csv_log.write_rates(update, rows)
    return csv_log


def test_relative_updates_are_written_where_they_were_recorded(tmp_path: Path) -> None:
    write_runs(tmp_path, (None, 2.5e-3))
    rows = plots.read_rows(tmp_path / "learning_rates.csv")
    assert [row["relative_update"] for row in rows] == [""] * 4 + ["0.0025"] * 4


def test_a_log_from_before_relative_updates_goes_on(tmp_path: Path) -> None:
    """Its rows stay, with an empty cell; those of other columns and torn ones do not."""
    old = tmp_path / "learning_rates.csv"
    header = ",".join(RATE_FIELDS[:-1])
    old.write_text(f"{header}\n4,head,5.0,0.005,0.0002\n8,head,5.0,0.004,0.0001\n8,{MATRIX},1")
    csv_log = CsvLog(tmp_path)
    csv_log.open(measured_up_to=0, rates_up_to=8)
    csv_log.write_rates(12, [("head", 5.0, 0.003, 0.0001, 2e-3)])
    rows = plots.read_rows(old)
    assert tuple(rows[0]) == RATE_FIELDS
    kept = [(row["iteration"], row["relative_update"]) for row in rows]
    assert kept == [("4", ""), ("8", ""), ("12", "0.002")]
    old.write_text("iteration,matrix,colour\n4,head,red\n")
    csv_log.open(measured_up_to=0, rates_up_to=8)
    assert plots.read_rows(old) == []


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
    header = ",".join(RATE_FIELDS[:-1])
    (tmp_path / "old" / "learning_rates.csv").write_text(f"{header}\n4,head,5.0,0.005,0.0002\n")
    assert not plots.relative_update_lines(tmp_path / "old", png)


def test_the_role_table_shows_what_was_not_measured() -> None:
    table = role_table({MATRIX: 2.5}, {MATRIX: 1.5, "head": 5.0}).splitlines()
    assert table[1].split() == ["up", "1", "2.500", "1.500", "to", "1.500"]
    assert table[2].split() == ["head", "1", "-", "5.000", "to", "5.000"]
