"""How the comparison tool starts jobs and how it records their results."""

import os
import signal
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import pytest
import yaml
from torch.utils.tensorboard import SummaryWriter

from megatron_llr.tools.compare.grid import Grid
from megatron_llr.tools.compare.jobs import (
    _finish,
    _Job,
    _job_environment,
    _Outcome,
    _start_job,
    _stop,
    pending,
    run_grid,
)
from megatron_llr.tools.compare.results import DONE

FLAGS = "--seq-length 16 --global-batch-size 4 --train-iters 100 --eval-iters 2"


def grid_of(out: Path, flags: str = FLAGS, *, script: str = "", gpus: float = 1) -> Grid:
    return Grid(
        out=out,
        flags=tuple(flags.split()),
        policies={"uniform": ("--llr-policy", "uniform")},
        learning_rates=(1e-3,),
        iterations=(100,),
        seeds=(1,),
        script=script,
        gpus_per_run=Fraction(gpus),
    )


def ended(grid: Grid, reached: int, program: str, log: str = "") -> _Outcome:
    """What the tool makes of a job that was evaluated last at an update and then ended."""
    run = grid.base_runs()[0]
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
    folder = grid.base_runs()[0].folder
    early = ended(grid, 50, "true")
    assert not early.done
    assert "last evaluated at update 50 of 100" in early.text
    assert "restarts it (no --save-interval)" in early.text
    (folder / "checkpoint").mkdir()
    assert "resumes its checkpoint" in ended(grid, 60, "true").text
    assert "FAILED with code 1" in ended(grid, 100, "false").text
    assert not (folder / DONE).exists()
    assert ended(grid, 100, "true").done
    assert (folder / DONE).exists()


def test_a_job_that_died_of_nan_is_done_wherever_it_was(tmp_path: Path) -> None:
    outcome = ended(grid_of(tmp_path), 50, "false", log="found NaN in local grad norm")
    assert outcome.done
    assert outcome.text.startswith("diverged")


def test_a_folder_whose_job_still_runs_is_refused(tmp_path: Path) -> None:
    script = tmp_path / "job.py"
    script.write_text("import time; time.sleep(60)")
    grid = grid_of(tmp_path / "out", script=str(script))
    run = grid.base_runs()[0]
    job = _start_job(grid, run, 0, 1)
    try:
        with pytest.raises(
            ValueError,
            match=r"A job still runs in .*seed-1: it holds a lock on .*log.txt.*Only one job",
        ):
            pending(grid)
    finally:
        _stop([job])
    assert pending(grid) == [run]


@pytest.mark.parametrize(
    ("visible", "of_jobs"),
    [
        (None, ["0,1", "2,3"]),
        ("7,5,3,1,0", ["7,5", "3,1"]),
        # Hidden GPUs stay hidden.
        ("", ["", ""]),
        ("-1", ["-1", "-1"]),
    ],
)
def test_jobs_share_the_visible_gpus(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, of_jobs: list[str]
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    grid = grid_of(Path("out"), gpus=2)
    chosen = [_job_environment(grid, slot, 2)["CUDA_VISIBLE_DEVICES"] for slot in range(2)]
    assert chosen == of_jobs


def test_jobs_take_no_gpu_that_is_not_visible(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    grid = grid_of(tmp_path)
    with pytest.raises(
        ValueError,
        match=r"CUDA_VISIBLE_DEVICES=4,5 has .*needs at least 3.*Lower --jobs.*gpus_per_run",
    ):
        run_grid(grid, grid.base_runs(), jobs=3, say=print)
    assert not any(tmp_path.iterdir())
    no_gpu = _job_environment(grid_of(tmp_path, gpus=0), 2, 3)
    assert no_gpu["CUDA_VISIBLE_DEVICES"] == ""


@pytest.mark.parametrize("ignored", [False, True])
def test_a_closed_terminal_ends_the_jobs(tmp_path: Path, ignored: bool) -> None:
    """Unless SIGHUP is ignored, as under nohup."""
    script, started, grid = (tmp_path / name for name in ("job.py", "started", "grid.yaml"))
    script.write_text(
        "import os, pathlib, time\n"
        f"pathlib.Path({str(started)!r}).write_text(str(os.getpid()))\n"
        "time.sleep(60)"
    )
    content = {"out": str(tmp_path / "out"), "script": str(script), "flags": FLAGS, "seeds": [1]}
    content |= {"learning_rates": [1e-3], "policies": {"uniform": "--llr-policy uniform"}}
    grid.write_text(yaml.safe_dump(content))
    root = Path(__file__).resolve().parents[2]
    tool = subprocess.Popen(
        [*(["nohup"] if ignored else []), sys.executable, "tools/compare.py", str(grid)],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 1800
    while not (started.exists() and started.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    job = Path("/proc") / started.read_text()
    tool.send_signal(signal.SIGHUP)
    if ignored:
        time.sleep(1)
        assert tool.poll() is None
        assert job.exists()
        tool.send_signal(signal.SIGTERM)
    else:
        # As a shell does after the terminal.
        tool.send_signal(signal.SIGHUP)
    _, errors = tool.communicate(timeout=1800)
    assert tool.returncode == (143 if ignored else 129), errors
    assert "Traceback" not in errors
    assert not job.exists()
