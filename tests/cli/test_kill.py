"""Kill -9 a job, or one rank of it, anywhere; start it again with the same command."""

import fcntl
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from tests.cli.test_script import MODEL, ROOT, environment

# Saves after 60 and 100; 60 lies inside the ramp that began at update 40.
FLAGS = (
    "--train-iters 100 --save-interval 60 --llr-interval 40 --llr-ramp-iters 30 "
    "--bf16 --use-distributed-optimizer --attention-dropout 0 --hidden-dropout 0"
).split()
FIRST, LAST = 60, 100
FAULTY = Path(__file__).with_name("faulty.py")

FORMATS = {
    "dist": "",
    "fully": "--dist-ckpt-optim-fully-reshardable",
    "async": "--async-save --use-persistent-ckpt-worker",
    "torch": "--ckpt-format torch",
}


class Job:
    """The script under torchrun, two ranks unless told otherwise, everything in one folder."""

    def __init__(self, folder: Path, saved_as: str, ranks: int = 2) -> None:
        self.folder = folder
        self.command = [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)),
            *("--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "pretrain_gpt_llr.py"),
            *(*MODEL, *FLAGS, *saved_as.split()),
            *("--save", str(folder / "checkpoint"), "--load", str(folder / "checkpoint")),
            *("--tensorboard-dir", str(folder / "tensorboard"), "--llr-log-dir", str(folder)),
        ]

    def _start(self, output: Any = subprocess.PIPE) -> "subprocess.Popen[bytes]":
        # Unbuffered, so that the pipe alone lies between the job and its reader.
        quiet = {"PYTHONUNBUFFERED": "1", "PYTHONWARNINGS": "ignore"}
        mark = {"LLR_TEST_JOB": str(self.folder)}
        return subprocess.Popen(
            self.command,
            cwd=ROOT,
            env={**environment(), **quiet, **mark},
            bufsize=0,
            stdout=output,
            stderr=subprocess.STDOUT,
        )

    def fail(self) -> str:
        """Run to an end that must be an error; what it printed."""
        with tempfile.TemporaryFile() as printed:
            process = self._start(printed)
            try:
                assert process.wait(timeout=1800) != 0
            finally:
                # Megatron's checkpoint worker outlives a rank that was killed.
                for left in psutil.process_iter(["environ"]):
                    if (left.info["environ"] or {}).get("LLR_TEST_JOB") == str(self.folder):
                        left.kill()
            printed.seek(0)
            return printed.read().decode(errors="replace")

    def finish(self) -> str:
        """Run to the end; what it printed."""
        process = self._start()
        output, _ = process.communicate(timeout=1800)
        assert process.returncode == 0, output.decode()[-3000:]
        return output.decode()

    def kill_when(self, seen: Any) -> list[str]:
        """SIGKILL every process of the job once `seen(line)`; the lines until then.

        The pipe holds one page: once it is no longer read, the job stands still after some fifteen
        iterations at most, however long the kill takes.
        """
        process = self._start()
        assert process.stdout is not None
        fcntl.fcntl(process.stdout, fcntl.F_SETPIPE_SZ, 4096)
        lines: list[str] = []
        try:
            while not (lines and seen(lines[-1])):
                line = b""
                while not line.endswith(b"\n"):
                    byte = process.stdout.read(1)
                    assert byte, "the job ended by itself:\n" + "\n".join(lines[-30:])
                    line += byte
                lines.append(line.decode(errors="replace").rstrip())
        finally:
            family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(True)]
            for member in family:
                member.send_signal(signal.SIGKILL)
            process.stdout.close()
            psutil.wait_procs(family, timeout=1800)
            process.wait(timeout=1800)
        return lines

    @property
    def last_saved(self) -> int:
        """The iteration that a restart goes on from; 0 before the first save."""
        tracker = self.folder / "checkpoint" / "latest_checkpointed_iteration.txt"
        return int(tracker.read_text()) if tracker.exists() else 0

    def losses(self) -> dict[int, float]:
        """TensorBoard's loss by iteration (the log line after a start averages two)."""
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        found: dict[int, float] = {}
        for path in sorted(
            (self.folder / "tensorboard").iterdir(), key=lambda p: p.stat().st_mtime
        ):
            events = EventAccumulator(str(path))
            events.Reload()
            if "lm loss" in events.Tags()["scalars"]:
                found.update((point.step, point.value) for point in events.Scalars("lm loss"))
        return found

    def weights(self) -> dict[str, torch.Tensor]:
        """The model's tensors in the last torch_dist checkpoint."""
        from torch.distributed import checkpoint
        from torch.distributed.checkpoint.metadata import TensorStorageMetadata

        reader = checkpoint.FileSystemReader(self.folder / "checkpoint" / f"iter_{LAST:07d}")
        found = {
            name: torch.empty(entry.size, dtype=entry.properties.dtype)
            for name, entry in reader.read_metadata().state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata) and not name.startswith("optimizer")
        }
        checkpoint.load(found, storage_reader=reader, no_dist=True)
        return found


def iteration(line: str) -> int:
    found = re.search(r"iteration +(\d+)/", line)
    return int(found.group(1)) if found else 0


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
        assert (restarted.folder / name).read_bytes() == (unbroken.folder / name).read_bytes()


def assert_same_weights(restarted: Job, unbroken: Job) -> None:
    expected, found = unbroken.weights(), restarted.weights()
    assert found.keys() == expected.keys()
    assert "decoder.layers.mlp.linear_fc1.weight" in found
    for name, weight in found.items():
        assert torch.equal(weight, expected[name]), name


@pytest.mark.parametrize("name", ["fully", "async", "torch"])
def test_killed_between_two_saves(name: str, unbroken: Job, tmp_path: Path) -> None:
    job = Job(tmp_path, FORMATS[name])
    job.kill_when(lambda line: iteration(line) > FIRST and job.last_saved == FIRST)
    assert job.last_saved == FIRST
    assert f"from {tmp_path / 'checkpoint'} " in job.finish()
    assert_the_same(job, unbroken)
    if name != "torch":
        assert_same_weights(job, unbroken)


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
    one.command[one.command.index("--llr-log-dir") + 1] = str(tmp_path / "one")
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
    assert_same_weights(job, unbroken)


def test_a_rank_that_dies_within_a_measurement_ends_the_job(unbroken: Job, tmp_path: Path) -> None:
    """Rank 1, before it shares its records in the measurement before update 80, the third."""
    job, faulty = Job(tmp_path, ""), Job(tmp_path, "")
    script = faulty.command.index("pretrain_gpt_llr.py")
    faulty.command[script : script + 1] = [str(FAULTY), "SIGKILL", "3"]
    printed = faulty.fail()
    assert "broke off during a measurement: RuntimeError: " in printed
    assert "Look for the first error of the other ranks: one of them died" in printed
    assert "Signal 9 (SIGKILL)" in printed
    assert "iteration       78/     100" in printed
    assert "iteration       79/     100" not in printed
    assert job.last_saved == FIRST
    job.finish()
    assert_the_same(job, unbroken)
    assert_same_weights(job, unbroken)


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
