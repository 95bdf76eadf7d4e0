"""What the comparison tool reads from a run's folder."""

from pathlib import Path

import pytest
from torch.utils.tensorboard import SummaryWriter

from megatron_llr.tools.compare.results import losses
from megatron_llr.tools.report.cli import validation_loss


def write_events(folder: Path, start: int, points: list[tuple[str, float, int]]) -> None:
    """One file of events, as a job leaves it that begins at the time `start`."""
    with SummaryWriter(folder / "new") as writer:
        for tag, value, step in points:
            writer.add_scalar(tag, value, step)
    for path in (folder / "new").iterdir():
        path.rename(folder / f"events.out.tfevents.{start}")


def test_the_loss_on_the_test_set_is_no_validation_loss(tmp_path: Path) -> None:
    """Megatron writes both under one tag; the test set comes last."""
    validation = "lm loss validation"
    points = [("lm loss", 6.0, 1), (validation, 4.7, 10)]
    points += [(validation, loss, 20) for loss in (4.4, 4.4, 5.6)]
    write_events(tmp_path / "tensorboard", 1000, points)
    first, curve = losses(tmp_path)
    assert first == 6.0
    assert curve == ((10, pytest.approx(4.7)), (20, pytest.approx(4.4)))
    assert validation_loss(tmp_path / "tensorboard") == "validation loss 4.4000 after update 20"


def test_a_resumed_job_replaces_the_iterations_that_it_repeats(tmp_path: Path) -> None:
    folder, tag = tmp_path / "tensorboard", "lm loss validation"
    write_events(
        folder, 1000, [("lm loss", 6.0, 1), (tag, 5.0, 10), (tag, 4.0, 20), (tag, 3.0, 30)]
    )
    write_events(folder, 1001, [("lm loss", 4.5, 11), (tag, 4.1, 20), (tag, 5.5, 20)])
    first, curve = losses(tmp_path)
    assert first == 6.0
    assert curve == ((10, 5.0), (20, pytest.approx(4.1)))
    assert validation_loss(folder) == "validation loss 4.1000 after update 20"
    assert validation_loss(tmp_path) is None
