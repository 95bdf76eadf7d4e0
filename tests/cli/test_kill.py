"""Kill -9 a job, or one rank of it, anywhere; start it again with the same command."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.cli.jobs import (
    FIRST,
    LAST,
    Job,
    Step,
    after,
    fill_disk,
    iteration,
    kill_launcher,
    remove_logs,
)
from tests.cli.test_script import MODEL, ROOT, environment

FAULTY = Path(__file__).with_name("faulty.py")
FORMATS = {
    "dist": "",
    "async": "--async-save --use-persistent-ckpt-worker",
    "torch": "--ckpt-format torch",
}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Job:
    job = Job(tmp_path_factory.mktemp("unbroken"), "")
    job.finish()
    return job


def assert_the_same(restarted: Job, unbroken: Job) -> None:
    expected = unbroken.losses()
    found = restarted.losses()
    assert set(expected) == set(range(1, LAST + 1))
    assert {step: found[step] for step in range(FIRST + 1, LAST + 1)} == {
        step: expected[step] for step in range(FIRST + 1, LAST + 1)
    }
    # Rates over norms of all weights, after every update; no row twice, none lost.
    for name in ("learning_rates.csv", "measurements.csv"):
        assert (restarted.log / name).read_bytes() == (unbroken.log / name).read_bytes()


def assert_same_state(restarted: Job, unbroken: Job) -> None:
    """Weights, optimizer and multipliers, to the bit."""
    differing = restarted.differences(unbroken)
    assert "decoder.layers.mlp.linear_fc1.weight" in restarted.tensors()
    assert not differing


@pytest.mark.parametrize("name", ["async", "torch"])
def test_killed_between_two_saves(name: str, unbroken: Job, tmp_path: Path) -> None:
    job = Job(tmp_path, FORMATS[name])
    job.kill_when(lambda line: iteration(line) > FIRST and job.last_saved == FIRST)
    assert job.last_saved == FIRST
    assert f"from {tmp_path / 'checkpoint'} " in job.finish()
    assert_the_same(job, unbroken)
    if name != "torch":
        assert_same_state(job, unbroken)


def test_killed_within_a_save(unbroken: Job, tmp_path: Path) -> None:
    """The second save never ends, since one of its files is a pipe that nobody reads."""
    job = Job(tmp_path, FORMATS["dist"])
    torn = tmp_path / "checkpoint" / f"iter_{LAST:07d}" / "__1_0.distcp"
    torn.parent.mkdir(parents=True)
    os.mkfifo(torn)
    job.kill_when(lambda line: f"saving checkpoint at iteration     {LAST}" in line)
    assert job.last_saved == FIRST
    torn.unlink()
    torn.write_bytes(b"torn")
    # What was saved of two replicas goes on with one (dp-reshardable), up to rounding.
    one = Job(tmp_path, "--exit-interval 70", ranks=1)
    one.command[one.command.index("--save") + 1] = str(tmp_path / "one")
    one.command[one.command.index("--llr-log-dir") + 1] = str(tmp_path / "one" / "log")
    one.command[one.command.index("--tensorboard-dir") + 1] = str(tmp_path / "one" / "tensorboard")
    one.finish()
    one.folder = tmp_path / "one"
    expected = unbroken.losses()
    found = one.losses()
    assert set(found) == set(range(FIRST + 1, 71))
    assert found == pytest.approx({step: expected[step] for step in found}, rel=1e-2)
    # And with both, to the bit.
    job.finish()
    assert_the_same(job, unbroken)
    assert_same_state(job, unbroken)


def test_three_deaths_and_a_removed_log(unbroken: Job, tmp_path: Path) -> None:
    """The short form of `make soak`: a rank, the launcher, a full disk."""
    job, faulty = Job(tmp_path, ""), Job(tmp_path, "")
    script = faulty.command.index("pretrain_gpt_llr.py")
    faulty.command[script : script + 1] = [str(FAULTY), "SIGKILL", "3"]
    # Rank 1 dies before it shares its records in the measurement before update 80, the third.
    ended = faulty.disturb()
    assert ended.code not in (0, None)
    assert "broke off during a measurement: RuntimeError: " in ended.text
    assert "Look for the first error of the other ranks: one of them died" in ended.text
    assert "Signal 9 (SIGKILL)" in ended.text
    assert "iteration       78/     100" in ended.text
    assert "iteration       79/     100" not in ended.text
    assert job.last_saved == FIRST
    ended = job.disturb(Step(after(65), remove_logs), Step(after(90), kill_launcher))
    assert (ended.code, ended.acted) == (-signal.SIGKILL, True)
    assert "learning_rates.csv was removed or emptied" in ended.text
    assert (job.log / "learning_rates.csv").read_text().startswith("iteration,")
    # The log that cannot be written is a warning, the checkpoint an error.
    ended = job.disturb(Step(after(65), fill_disk))
    assert (ended.code != 0, ended.acted) == (True, True)
    assert "log not written: " in ended.text
    assert job.last_saved == FIRST
    assert f"from {tmp_path / 'checkpoint'} " in job.finish()
    assert job.differences(unbroken, gone_up_to=FIRST) == []
    expected, found = unbroken.losses(), job.losses()
    for step in range(FIRST + 1, LAST + 1):
        assert found[step] == expected[step]


def test_a_rank_that_stands_still_is_noticed_when_the_time_is_up() -> None:
    """SIGSTOP on rank 1 before update 4; Megatron shortens the time after the first update."""
    flags = "--distributed-timeout-seconds-after-init 15 --tensor-model-parallel-size 2".split()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    # Without torchrun, which would wait half a minute for the one that cannot end.
    ranks = [
        subprocess.Popen(
            [sys.executable, str(FAULTY), "SIGSTOP", "3", *MODEL, *flags],
            cwd=ROOT,
            env={
                **environment(),
                **{"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"},
                **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "PYTHONWARNINGS": "ignore"},
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in "01"
    ]
    try:
        printed, _ = ranks[0].communicate(timeout=1800)
        assert ranks[0].returncode not in (0, None)
        assert psutil.Process(ranks[1].pid).status() == psutil.STATUS_STOPPED
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate(timeout=1800)
    assert "measured 14 matrices before update 2 " in printed
    errors = [line for line in printed.splitlines() if "RuntimeError: megatron" in line]
    assert "broke off during a measurement: RuntimeError: " in errors[-1]
    assert "Timed out waiting 15000ms" in errors[-1]
    assert "--distributed-timeout-minutes" in errors[-1]
