"""How the comparison tool starts jobs and what it makes of their ends."""

import subprocess
import time
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from megatron_llr.compare.grid import Grid
from megatron_llr.compare.results import DONE
from megatron_llr.compare.runner import _finish, _Job, _Outcome

FLAGS = "--seq-length 16 --global-batch-size 4 --train-iters 100 --eval-iters 2"


def grid_of(out: Path, flags: str = FLAGS, *, script: str = "", gpus: int = 1) -> Grid:
    policies = {"uniform": ("--llr-policy", "uniform")}
    numbers = ((1e-3,), (1,), "uniform", 0.1)
    return Grid(out, tuple(flags.split()), policies, *numbers, (), script, gpus)


def ended(grid: Grid, reached: int, program: str, log: str = "") -> _Outcome:
    """What the tool makes of a job that was evaluated last at an update and then ended."""
    run = grid.runs()[0]
    run.folder.mkdir(parents=True, exist_ok=True)
    (run.folder / "log.txt").write_text(log)
    with SummaryWriter(run.folder / "tensorboard") as writer:
        writer.add_scalar("lm loss", 5.0, 1)
        writer.add_scalar("lm loss validation", 3.0, reached)
    process = subprocess.Popen([program])
    process.wait()
    return _finish(grid, _Job(run, process, time.monotonic(), 0), {})


def test_a_job_that_ends_before_its_last_update_is_not_done(tmp_path: Path) -> None:
    grid = grid_of(tmp_path)
    folder = grid.runs()[0].folder
    early = ended(grid, 50, "true")
    assert not early.done
    assert "last evaluated at update 50 of 100" in early.text
    assert "begins it again (no --save-interval)" in early.text
    (folder / "checkpoint").mkdir()
    assert "goes on from its checkpoint" in ended(grid, 60, "true").text
    assert "FAILED with code 1" in ended(grid, 100, "false").text
    assert not (folder / DONE).exists()
    assert ended(grid, 100, "true").done
    assert (folder / DONE).exists()


def test_a_job_that_died_of_nan_is_done_wherever_it_was(tmp_path: Path) -> None:
    outcome = ended(grid_of(tmp_path), 50, "false", log="found NaN in local grad norm")
    assert outcome.done
    assert outcome.text.startswith("diverged")
