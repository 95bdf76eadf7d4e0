"""Runs that follow from results: rates that `extend` adds, several lengths, shared GPUs."""

import csv
import math
import os
import signal
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_llr.tools.compare.grid_file import read_grid
from megatron_llr.tools.compare.jobs import _job_environment
from megatron_llr.tools.compare.planning import planned_runs, rate_search

ROOT = Path(__file__).resolve().parents[2]
FLAGS = "--seq-length 16 --global-batch-size 4 --eval-iters 2"

# In place of a training script: the loss is a parabola in log2 of the rate, whose minimum is at
# 0.016 for 10 updates and at 0.004 for 20. A file `hold` keeps the runs at 0.008 from ending.
SCRIPT = """
import math, sys, time
from pathlib import Path
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

def value(flag):
    return sys.argv[sys.argv.index(flag) + 1]

rate, updates = float(value("--lr")), int(value("--train-iters"))
while rate == 0.008 and Path(__file__).with_name("hold").exists():
    time.sleep(0.05)
loss = 2 + 0.1 * (math.log2(rate / (0.016 if updates == 10 else 0.004))) ** 2
writer = EventFileWriter(value("--tensorboard-dir"))
for tag, step, number in (("lm loss", 1, 9.0), ("lm loss validation", updates, loss)):
    summary = Summary(value=[Summary.Value(tag=tag, simple_value=number)])
    writer.add_event(Event(step=step, wall_time=time.time(), summary=summary))
writer.close()
"""


def write_grid(folder: Path, **more: Any) -> Path:
    (folder / "job.py").write_text(SCRIPT)
    content: dict[str, Any] = {
        "out": str(folder / "out"),
        "script": str(folder / "job.py"),
        "flags": FLAGS,
        "policies": {"uniform": "--llr-policy uniform"},
        "learning_rates": [1e-3, 2e-3, 4e-3],
        "seeds": [1],
        "gpus_per_run": 0,
    }
    path = folder / "grid.yaml"
    path.write_text(yaml.safe_dump({**content, **more}))
    return path


def start(path: Path, *more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "tools/compare.py", str(path), *more],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def parabola(minimum: float) -> Any:
    return lambda rate: math.log(rate / minimum) ** 2


@pytest.mark.parametrize(
    ("rates", "minimum", "limit", "tried", "bracketed"),
    [
        ([1e-3, 2e-3, 4e-3], 2e-3, 4, [1e-3, 2e-3, 4e-3], True),
        ([1e-3, 2e-3, 4e-3], 8e-3, 4, [1e-3, 2e-3, 4e-3, 8e-3, 16e-3], True),
        ([1e-3, 2e-3, 4e-3], 1e-4, 2, [2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3], False),
        ([1e-3, 3e-3], 1e-3, 4, [1e-3 / 3, 1e-3, 3e-3], True),
        ([1e-3], 1e-3, 4, [5e-4, 1e-3, 2e-3], True),
        ([1e-3, 2e-3], 1e-1, 0, [1e-3, 2e-3], False),
    ],
)
def test_a_rate_is_added_beyond_the_best_until_it_is_bracketed(
    rates: list[float], minimum: float, limit: int, tried: list[float], bracketed: bool
) -> None:
    search = rate_search(rates, limit, parabola(minimum))
    assert search.rates == pytest.approx(tried, rel=1e-5)
    assert search.bracketed is bracketed
    assert search.added == len(tried) - len(rates) <= limit


def test_divergence_brackets_and_missing_runs_stop_the_search() -> None:
    search = rate_search([1e-3, 2e-3], 4, lambda rate: math.inf if rate > 3e-3 else -rate)
    assert (search.rates, search.best, search.bracketed) == ((1e-3, 2e-3, 4e-3), 2e-3, True)
    # All diverged: only smaller rates can help.
    search = rate_search([1.0, 2.0], 2, lambda rate: math.inf)
    assert search.rates == (0.25, 0.5, 1.0, 2.0)
    assert not search.bracketed
    search = rate_search([1e-3, 2e-3], 4, lambda rate: None if rate > 3e-3 else -rate)
    assert (search.rates, search.best) == ((1e-3, 2e-3, 4e-3), None)


def test_a_stopped_grid_continues_its_search(tmp_path: Path) -> None:
    """Two lengths whose best rates differ; the tool is stopped while it runs an added rate."""
    path = write_grid(tmp_path, iterations=[20, 10], extend=True)
    (tmp_path / "hold").touch()
    first = start(path, "--jobs", "2")
    added = tmp_path / "out" / "uniform" / "iters-10" / "lr-0.008" / "seed-1"
    deadline = time.monotonic() + 1800
    while not added.exists() and first.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    first.send_signal(signal.SIGTERM)
    output, _ = first.communicate(timeout=1800)
    assert first.returncode == 143, output
    assert added not in [path.parent for path in done(tmp_path)]
    (tmp_path / "hold").unlink()
    output, _ = start(path, "--jobs", "2").communicate(timeout=1800)
    assert "best rate not bracketed" not in output
    folders = {p.parent.parent.relative_to(tmp_path / "out" / "uniform") for p in done(tmp_path)}
    assert {str(folder) for folder in folders} == {
        *(f"iters-20/lr-{rate}" for rate in ("0.001", "0.002", "0.004", "0.008")),
        *(f"iters-10/lr-{rate}" for rate in ("0.001", "0.002", "0.004", "0.008", "0.016")),
        "iters-10/lr-0.032",
    }
    with (tmp_path / "out" / "runs.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {(row["iterations"], row["tokens"]) for row in rows} == {("10", "640"), ("20", "1280")}
    with (tmp_path / "out" / "table.csv").open() as file:
        best = {row["iterations"]: row["best_learning_rate"] for row in csv.DictReader(file)}
    assert best == {"10": "0.016", "20": "0.004"}
    # Nothing is left to do.
    output, _ = start(path).communicate(timeout=1800)
    assert "10 of 10 runs are already done" in output


def done(folder: Path) -> list[Path]:
    return sorted((folder / "out").rglob("done.json"))


def test_a_search_is_bounded_and_the_report_says_so(tmp_path: Path) -> None:
    path = write_grid(tmp_path, iterations=[10], extend=1)
    output, _ = start(path).communicate(timeout=1800)
    assert len(done(tmp_path)) == 4
    assert (
        "best rate not bracketed by those tried, after up to 1 added rates: "
        "uniform (largest, 0.008)" in output
    )


def test_lengths_in_tokens_are_whole_updates(tmp_path: Path) -> None:
    grid = read_grid(write_grid(tmp_path, tokens=[6400, "1.3e3"]))
    assert grid.iterations == (20, 100)
    run = grid.base_runs()[0]
    assert run.settings[run.settings.index("--train-iters") + 1] == "20"
    assert str(run) == "uniform, 20 updates, lr 0.001, seed 1"
    assert planned_runs(grid) == grid.base_runs()


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({}, "no training length"),
        ({"tokens": [640], "iterations": [10]}, "iterations and tokens"),
        ({"tokens": [640, 650]}, "tokens that differ in whole updates"),
        ({"iterations": [0, 10]}, "all above 0"),
        ({"iterations": [10], "flags": FLAGS + " --train-iters 5"}, "--train-iters in the flags"),
        ({"iterations": [10], "flags": FLAGS + " --lr-decay-iters 5"}, "no --lr-decay-iters"),
        ({"iterations": [10], "extend": 1.5}, "extend: 1.5"),
        ({"iterations": [10], "extend": "on demand"}, "extend: 'on demand'"),
        ({"iterations": [10], "gpus_per_run": 0.3}, "1 over a whole number"),
        ({"iterations": [10], "gpus_per_run": 1.5}, "1 over a whole number"),
        ({"iterations": [10], "gpus_per_run": 0.01}, "at most 32 jobs on a GPU"),
        ({"iterations": [10], "jobs_per_gpu": 4}, "gpus_per_run and jobs_per_gpu"),
        (
            {"iterations": [10], "gpus_per_run": 0.5, "launch": "torchrun --nproc-per-node 8"},
            "1/2 GPU per run with 8 ranks on a node",
        ),
        ({"iterations": [10], "sensitivity": [0.7, 1]}, "factors there other than 1"),
        ({"iterations": [10], "sensitivity": {"factors": [2], "policy": "x"}}, "a policy of uni"),
        ({"iterations": [10], "sensitivity": {"roles": ["q"]}}, "a mapping with factors"),
    ],
)
def test_bad_values_are_refused(tmp_path: Path, more: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=r"^megatron_llr: The grid .*It must have ") as caught:
        read_grid(write_grid(tmp_path, **more))
    assert text in str(caught.value)


@pytest.mark.parametrize(
    ("gpus", "jobs", "visible", "of_jobs"),
    [
        (0.25, 4, "5", ["5", "5", "5", "5"]),
        (0.25, 6, "5,7", ["5", "5", "5", "5", "7", "7"]),
        (0.33, 4, "5,7", ["5", "5", "5", "7"]),
        (2, 2, "0,1,2,3", ["0,1", "2,3"]),
    ],
)
def test_small_jobs_share_a_gpu(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    gpus: float,
    jobs: int,
    visible: str,
    of_jobs: list[str],
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    grid = read_grid(write_grid(tmp_path, iterations=[10], gpus_per_run=gpus))
    chosen = [_job_environment(grid, slot, jobs)["CUDA_VISIBLE_DEVICES"] for slot in range(jobs)]
    assert chosen == of_jobs


def test_too_few_gpus_for_the_jobs_that_share_them(tmp_path: Path) -> None:
    path = write_grid(tmp_path, iterations=[10], gpus_per_run=0.5)
    tool = subprocess.run(
        [sys.executable, "tools/compare.py", str(path), "--jobs", "3"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "0"},
        capture_output=True,
        text=True,
    )
    assert tool.returncode == 1
    assert "CUDA_VISIBLE_DEVICES=0 has too few GPUs" in tool.stderr
    assert "gpus_per_run 1/2 needs at least 2" in tool.stderr
    assert done(tmp_path) == []
    path.write_text(path.read_text().replace("gpus_per_run: 0.5", "jobs_per_gpu: 3"))
    assert read_grid(path).gpus_per_run == Fraction(1, 3)
