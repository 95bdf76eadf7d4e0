"""Runs a grid, one or several jobs at a time. An interrupted grid continues where it stopped."""

import fcntl
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import IO

from megatron_llr.errors import input_error
from megatron_llr.tools.compare.command_flags import value_of, values_by_flag
from megatron_llr.tools.compare.gpus import gpus_of
from megatron_llr.tools.compare.grid import SCRIPT, Grid, Run
from megatron_llr.tools.compare.planning import planned_runs
from megatron_llr.tools.compare.results import DONE, losses, read_done, write_done
from megatron_llr.version import __version__

# Messages of Megatron's checks that end a job whose loss or gradient is not finite.
_NOT_FINITE = re.compile(r"found (NaN|Inf) in|Unexpected result (nan|inf)", re.I)
_POLL_SECONDS = 0.2
# Ranks have their own process sessions: only torchrun can signal them, and it kills them after 30 s
# (torch.distributed.elastic.multiprocessing).
_GRACE_SECONDS = 45


@dataclass
class _Job:
    run: Run
    process: subprocess.Popen[bytes]
    started: float
    slot: int


def environment(grid: Grid) -> dict[str, str]:
    """Package versions and launcher, which affect a run's results besides its settings."""
    versions = {"megatron-llr": __version__, "python": sys.version.split()[0]}
    versions["launch"] = " ".join(grid.launch) or "one process"
    for package in ("torch", "megatron-core", "transformer-engine"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    try:
        revision = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
        )
        versions["commit"] = revision.stdout.strip()
    except OSError:
        versions["commit"] = ""
    return versions


def command(grid: Grid, run: Run, slot: int = 0) -> list[str]:
    """The command line of a run; `slot` numbers the jobs that run at the same time."""
    launch = grid.launch or (sys.executable, "-W", "ignore")
    paths = ["--tensorboard-dir", str(run.folder / "tensorboard"), "--llr-log-dir", str(run.folder)]
    if value_of(run.settings, "--data-cache-path") is None:
        # Jobs that build an index at the same time must not share the file.
        paths += ["--data-cache-path", str(grid.out / "cache" / f"slot-{slot}")]
    if value_of(run.settings, "--save-interval") is not None:
        checkpoint = str(run.folder / "checkpoint")
        paths += ["--save", checkpoint, "--load", checkpoint]
    # The loss at update 1 is needed to compare initial weights and to detect divergence.
    script = [grid.script]
    if grid.script == SCRIPT and not Path(SCRIPT).exists():
        # Installed without the repository.
        script = ["-m", "megatron_llr.megatron.pretrain"]
    return [*launch, *script, *run.settings, *paths, "--tensorboard-log-interval", "1"]


def _job_environment(grid: Grid, slot: int, jobs: int) -> dict[str, str]:
    chosen = dict(os.environ)
    if not grid.launch:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        # The environment that torchrun sets for a job of one process.
        chosen.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
        chosen.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        chosen.setdefault("OMP_NUM_THREADS", "1")
    if jobs > 1:
        chosen["CUDA_VISIBLE_DEVICES"] = ",".join(gpus_of(slot, jobs, grid.gpus_per_run))
    return chosen


def _lock(log: IO[bytes]) -> bool:
    """Lock a job's log; False if a job started by another call still holds the lock."""
    try:
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        # A file system without locks.
        return True
    return True


def pending(
    grid: Grid, *, rerun_changed: bool = False, started: Collection[Path] = ()
) -> list[Run]:
    """The runs that are known so far and not done.

    Args:
        grid: the grid.
        rerun_changed: whether finished runs with different settings are repeated.
        started: folders of runs that this call started, which are left out.

    Raises:
        ValueError: if a finished run had different settings, unless `rerun_changed` allows its
            result to be deleted; or if a job of another call still runs in a folder.
    """
    waiting = []
    for run in planned_runs(grid):
        if run.folder in started:
            continue
        record = read_done(run)
        if record is None:
            waiting.append(run)
        elif record["digest"] != run.digest:
            before, now = values_by_flag(record["settings"]), values_by_flag(run.settings)
            changed = sorted(f for f in before.keys() | now.keys() if before.get(f) != now.get(f))
            if not rerun_changed:
                difference = ", ".join(f"{f} {before.get(f)}, now {now.get(f)}" for f in changed)
                raise input_error(
                    f"{run.folder} has a finished run with different settings: "
                    f"{difference or 'the same flags in another order'}. They must be the settings "
                    "of the grid. Choose another folder with --out, or delete the result and run "
                    "again with --rerun-changed."
                )
            waiting.append(run)
    for path in (run.folder / "log.txt" for run in waiting):
        if not path.exists():
            continue
        with path.open("ab") as log:
            if not _lock(log):
                raise input_error(
                    f"A job still runs in {path.parent}: it holds a lock on {path}. Only one job "
                    f"may use a folder. Wait for the job or stop it (fuser -v {path} lists its "
                    "processes)."
                )
    return waiting


def _prepare_folder(run: Run) -> None:
    """Empty the folder of a run, unless it has a checkpoint with the same settings."""
    begun = run.folder / "begun.txt"
    resumes = (
        (run.folder / "checkpoint").exists()
        and not (run.folder / DONE).exists()
        and begun.exists()
        and begun.read_bytes() == run.digest.encode()
    )
    if run.folder.exists() and not resumes:
        shutil.rmtree(run.folder)
    run.folder.mkdir(parents=True, exist_ok=True)
    begun.write_text(run.digest, encoding="utf-8")


def _start_job(grid: Grid, run: Run, slot: int, jobs: int) -> _Job:
    _prepare_folder(run)
    with (run.folder / "log.txt").open("ab") as log:
        _lock(log)
        process = subprocess.Popen(
            command(grid, run, slot),
            stdout=log,
            stderr=subprocess.STDOUT,
            env=_job_environment(grid, slot, jobs),
            start_new_session=True,
        )
    return _Job(run, process, time.monotonic(), slot)


def _stop(jobs: Sequence[_Job]) -> None:
    """End jobs and all their ranks."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + _GRACE_SECONDS
        for job in jobs:
            if job.process.poll() is None:
                os.killpg(job.process.pid, number)
        while time.monotonic() < deadline and any(job.process.poll() is None for job in jobs):
            time.sleep(_POLL_SECONDS)


@dataclass(frozen=True)
class _Outcome:
    """The result of a job that ended, and whether it is done, so that it is not run again."""

    text: str
    done: bool


def _finish(grid: Grid, job: _Job, versions: dict[str, str]) -> _Outcome:
    """Record a job that ended, if it reached its last update or a loss that is not finite."""
    seconds = time.monotonic() - job.started
    text = (job.run.folder / "log.txt").read_text(errors="replace")
    code = job.process.returncode
    died_of_nan = code != 0 and _NOT_FINITE.search(text) is not None
    _, curve = losses(job.run.folder)
    if not died_of_nan:
        reached = curve[-1][0] if curve else 0
        if code == 0 and reached < job.run.iterations:
            # --exit-interval, a time limit, a signal.
            saved = (job.run.folder / "checkpoint").exists()
            next_call = "resumes its checkpoint" if saved else "restarts it (no --save-interval)"
            text = (
                f"NOT DONE, exited with code 0, last evaluated at update {reached} of "
                f"{job.run.iterations}: see {job.run.folder}/log.txt; the next call {next_call}"
            )
            return _Outcome(text, done=False)
        if code != 0:
            return _Outcome(f"FAILED with code {code}: see {job.run.folder}/log.txt", done=False)
    write_done(
        job.run,
        died_of_nan=died_of_nan,
        seconds=seconds,
        environment=versions,
        command=command(grid, job.run, job.slot),
    )
    result = "diverged" if died_of_nan else f"validation {curve[-1][1]:.4f}"
    return _Outcome(f"{result} ({seconds:.0f} s)", done=True)


@dataclass
class _Progress:
    """Counts runs and estimates the time left.

    Attributes:
        total: runs of the grid that are known so far.
        waiting: those that this call runs.
        done: those of them that ended.
        begun: time of the first start.
    """

    total: int
    waiting: int
    done: int
    begun: float

    def add(self, count: int) -> None:
        """Take in runs that follow from results."""
        self.waiting += count
        self.total += count

    def ended(self, run: Run, outcome: str) -> str:
        """Count a run that ended; returns its line."""
        self.done += 1
        rest = (time.monotonic() - self.begun) / self.done * (self.waiting - self.done) / 60
        number = self.total - self.waiting + self.done
        return f"[{number}/{self.total}] {run}: {outcome}; about {rest:.0f} min left"


def run_grid(
    grid: Grid,
    waiting: Sequence[Run],
    *,
    jobs: int,
    say: Callable[[str], None],
    rerun_changed: bool = False,
) -> list[Run]:
    """Run the waiting jobs, and those that follow from their results.

    Args:
        grid: the grid.
        waiting: as `pending` gives it.
        jobs: number of jobs at a time.
        say: prints a line of progress.
        rerun_changed: as for `pending`.

    Returns:
        The runs that did not reach their last update; the next call runs them again.

    Raises:
        ValueError: before any job starts, if there are too few GPUs for `jobs`.
    """
    if jobs > 1:
        gpus_of(0, jobs, grid.gpus_per_run)
    left, versions = list(waiting), environment(grid)
    progress = _Progress(len(planned_runs(grid)), len(left), 0, time.monotonic())
    started: set[Path] = set()
    failed: list[Run] = []
    active: list[_Job] = []
    if already := progress.total - len(left):
        say(f"{already} of {progress.total} runs are already done")
    try:
        while left or active:
            while left and len(active) < jobs:
                slot = min(set(range(jobs)) - {job.slot for job in active})
                active.append(_start_job(grid, left.pop(0), slot, jobs))
                started.add(active[-1].run.folder)
            time.sleep(_POLL_SECONDS)
            for job in [job for job in active if job.process.poll() is not None]:
                active.remove(job)
                outcome = _finish(grid, job, versions)
                failed += [] if outcome.done else [job.run]
                if not left:
                    left = pending(grid, rerun_changed=rerun_changed, started=started)
                    progress.add(len(left))
                say(progress.ended(job.run, outcome.text))
    finally:
        _stop(active)
    return failed
