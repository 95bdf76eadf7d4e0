"""One job on gloo ranks under torchrun, as a user starts it, and ways to end it.

`test_kill.py` and `tests/soak/soak.py` use it.
"""

import fcntl
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from megatron_llr.tools.convert.read_torch_dist import TorchDistReader
from tests.cli.test_script import MODEL, ROOT, environment

# Saves after 60 and 100; 60 lies inside the ramp that began at update 40.
FLAGS = (
    "--train-iters 100 --save-interval 60 --llr-interval 40 --llr-ramp-iters 30 "
    "--bf16 --use-distributed-optimizer --attention-dropout 0 --hidden-dropout 0"
).split()
FIRST, LAST = 60, 100
_LONGEST_SECONDS = 1800


class Job:
    """The script under torchrun, two ranks by default, everything in one folder."""

    def __init__(
        self, folder: Path, saved_as: str, ranks: int = 2, flags: Sequence[str] = FLAGS
    ) -> None:
        self.folder, self.flags = folder, flags
        self.command = [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)),
            *("--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "pretrain_gpt_llr.py"),
            *(*MODEL, *flags, *saved_as.split()),
            *("--save", str(folder / "checkpoint"), "--load", str(folder / "checkpoint")),
            *("--tensorboard-dir", str(folder / "tensorboard"), "--llr-log-dir", str(self.log)),
        ]

    @property
    def log(self) -> Path:
        """Folder of the CSV files."""
        return self.folder / "log"

    def _start(self) -> "subprocess.Popen[bytes]":
        # Unbuffered, and a pipe of one page: if its output is not read, the job blocks after some
        # fifteen iterations at most.
        quiet = {"PYTHONUNBUFFERED": "1", "PYTHONWARNINGS": "ignore"}
        mark = {"LLR_TEST_JOB": str(self.folder)}
        process = subprocess.Popen(
            self.command,
            cwd=ROOT,
            env={**environment(), **quiet, **mark},
            bufsize=0,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        assert process.stdout is not None
        fcntl.fcntl(process.stdout, fcntl.F_SETPIPE_SZ, 4096)
        return process

    def processes(self) -> list[psutil.Process]:
        """All processes of the job, whoever their parent is."""
        return [
            each
            for each in psutil.process_iter(["environ", "status"])
            if (each.info["environ"] or {}).get("LLR_TEST_JOB") == str(self.folder)
            and each.info["status"] != psutil.STATUS_ZOMBIE
        ]

    def disturb(self, *steps: "Step") -> "Ended":
        """Run; take each step when it is due; wait for the end of all processes.

        A step without delay acts before more output is read, so a slow machine delays the job.

        Raises:
            AssertionError: if a process of the job is left 5 minutes after the end of the launcher.
        """
        process, lines, waiting = self._start(), [""], list(steps)
        assert process.stdout is not None
        stream, position = process.stdout, 0

        def held() -> bool:
            due = any(not step.delay and step.seen(lines[-1]) for step in waiting[:1])
            return due and process.poll() is None

        def read() -> None:
            for line in stream:
                lines.append(line.decode(errors="replace").rstrip())
                while held():
                    time.sleep(0.005)

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        end = time.monotonic() + _LONGEST_SECONDS
        try:
            while process.poll() is None:
                assert time.monotonic() < end, "the job hangs:\n" + "\n".join(lines[-30:])
                time.sleep(0.005)
                if waiting and any(map(waiting[0].seen, lines[position:])):
                    position = len(lines) - 1
                    time.sleep(waiting[0].delay)
                    waiting[0].act(self, process)
                    waiting.pop(0)
            _, left = psutil.wait_procs(self.processes(), timeout=300)
            assert not left, f"left behind: {[each.cmdline() for each in left]}"
        finally:
            process.kill()
            for left_behind in self.processes():
                left_behind.kill()
            process.wait(timeout=1800)
            reader.join(timeout=1800)
        return Ended(process.returncode, lines, acted=not waiting)

    def finish(self) -> str:
        """Run to the end; what it printed."""
        process = self._start()
        output, _ = process.communicate(timeout=1800)
        assert process.returncode == 0, output.decode()[-3000:]
        return output.decode()

    def kill_when(self, seen: Any) -> list[str]:
        """SIGKILL every process of the job once `seen(line)`; the lines until then.

        Its output is no longer read then, so that the job waits, however long the kill takes.
        """
        process = self._start()
        assert process.stdout is not None
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
        """The iteration that a restart continues from; 0 before the first save."""
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

    @property
    def saved(self) -> Path:
        """Folder of the checkpoint of the last update."""
        return self.folder / "checkpoint" / f"iter_{LAST:07d}"

    def scheduler(self) -> dict[str, Any]:
        """State of the scheduler in the last torch_dist checkpoint, multipliers included."""
        return dict(TorchDistReader(self.saved).common_state()["opt_param_scheduler"])

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors of model and optimizer in the last torch_dist checkpoint."""
        from torch.distributed import checkpoint
        from torch.distributed.checkpoint.metadata import TensorStorageMetadata

        reader = checkpoint.FileSystemReader(self.saved)
        found = {
            name: torch.empty(entry.size, dtype=entry.properties.dtype)
            for name, entry in reader.read_metadata().state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        checkpoint.load(found, storage_reader=reader, no_dist=True)
        return found

    def rows(self, name: str) -> list[str]:
        """Lines of one of the CSV files, without the header.

        A file of a removed folder is created only for its next row.
        """
        path = self.log / name
        return path.read_text().splitlines()[1:] if path.exists() else []

    def differences(self, other: "Job", gone_up_to: int = 0) -> list[str]:
        """What differs from another job at the end, as text; empty if nothing does.

        Args:
            other: the job that was not disturbed.
            gone_up_to: last update whose rows may be missing, with all before, because the log was
                removed.
        """
        lines = []
        expected, tensors = other.tensors(), self.tensors()
        if tensors.keys() != expected.keys():
            lines.append(f"tensors {sorted(tensors.keys() ^ expected.keys())}")
        else:
            lines += [name for name in tensors if not torch.equal(tensors[name], expected[name])]
        if self.scheduler() != other.scheduler():
            lines.append("state of the scheduler")
        for name, more in (("learning_rates.csv", 0), ("measurements.csv", 1)):
            rows, whole = self.rows(name), other.rows(name)
            missing = whole[: len(whole) - len(rows)]
            # The measurement before an update is made at the end of the update before.
            if rows != whole[len(missing) :] or any(
                int(row.partition(",")[0]) > gone_up_to + more for row in missing
            ):
                lines.append(f"{name}: {len(rows)} rows instead of {len(whole)}")
        return lines


def iteration(line: str) -> int:
    """The iteration that a line of Megatron's log reports; 0 if it reports none."""
    match = re.search(r"iteration +(\d+)/", line)
    return int(match[1]) if match else 0


@dataclass(frozen=True)
class Step:
    """Something that happens to a job.

    Attributes:
        seen: whether it is due after a line of output.
        act: does it, given the job and its launcher.
        delay: seconds between the two.
    """

    seen: Callable[[str], bool]
    act: Callable[[Job, "subprocess.Popen[bytes]"], None]
    delay: float = 0.0


@dataclass(frozen=True)
class Ended:
    """How a job ended: exit code, output, and whether all steps were taken before."""

    code: int
    lines: list[str]
    acted: bool

    @property
    def text(self) -> str:
        """The output."""
        return "\n".join(self.lines)


def after(update: int) -> Callable[[str], bool]:
    """Due once an update is reported."""
    return lambda line: iteration(line) >= update


def _ranks(process: "subprocess.Popen[bytes]") -> list[psutil.Process]:
    """The ranks of a launcher that have begun."""
    return psutil.Process(process.pid).children()


def kill_rank(number: int) -> Callable[[Job, "subprocess.Popen[bytes]"], None]:
    """SIGKILL to one rank."""

    def act(job: Job, process: "subprocess.Popen[bytes]") -> None:
        while process.poll() is None:
            if ranks := _ranks(process):
                ranks[number % len(ranks)].kill()
                return
            time.sleep(0.01)

    return act


def kill_launcher(job: Job, process: "subprocess.Popen[bytes]") -> None:
    """SIGKILL to torchrun only."""
    process.kill()


def terminate(job: Job, process: "subprocess.Popen[bytes]") -> None:
    """SIGTERM to torchrun, as a scheduler of jobs sends it."""
    process.terminate()


def fill_disk(job: Job, process: "subprocess.Popen[bytes]") -> None:
    """From now on the ranks cannot make any file longer than a byte."""
    for member in psutil.Process(process.pid).children(recursive=True):
        try:
            _, hard = member.rlimit(psutil.RLIMIT_FSIZE)
            member.rlimit(psutil.RLIMIT_FSIZE, (1, hard))
        except psutil.NoSuchProcess:
            continue


def remove_logs(job: Job, process: "subprocess.Popen[bytes]") -> None:
    """Remove the folder of the CSV files, also if a row is written at the same time."""
    while job.log.exists():
        shutil.rmtree(job.log, ignore_errors=True)
