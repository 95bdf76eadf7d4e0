"""What is written where: scalars for the host's writers, tables for people."""

from pathlib import Path
from typing import Any

from megatron_llr.observe.csv_log import CsvLog
from megatron_llr.observe.observer import Observer
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
    observer.stepped(7, {MATRIX: (2.0, 2e-3, 1e-4), "head": (5.0, 5e-3, 2e-4)})
    assert tensorboard.scalars["llr/multiplier/up/block_002"] == 2.0
    assert tensorboard.scalars["llr/learning_rate/head"] == 5e-3
    assert tensorboard.scalars["llr/effective_learning_rate-by-role/up/max"] == 1e-4
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
    observer.stepped(1, {MATRIX: (1.0, 1.0, 1.0)})
    assert "not written" in caplog.text


def test_the_role_table_shows_what_was_not_measured() -> None:
    table = role_table({MATRIX: 2.5}, {MATRIX: 1.5, "head": 5.0}).splitlines()
    assert table[1].split() == ["up", "1", "2.500", "1.500", "to", "1.500"]
    assert table[2].split() == ["head", "1", "-", "5.000", "to", "5.000"]
