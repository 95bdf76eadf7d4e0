"""The whole self-test on one rank: process group, environment, rows, table, JSON file."""

import contextlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from megatron_llr.errors import input_error
from megatron_llr.megatron import launch
from megatron_llr.tools.self_test import environment
from megatron_llr.tools.self_test.layouts import Layout, training_flags
from megatron_llr.tools.self_test.progress import Progress
from megatron_llr.tools.self_test.results import CHECKS, Results, Row, spelled, table


@dataclass(frozen=True)
class Options:
    """What the command line gives.

    Attributes:
        layouts: to run, in order.
        only: names of those to check; empty for all. The others only save the weights of a model.
        device: auto, cuda or cpu.
        out: the JSON file.
        timeout: seconds without progress after which the job is stopped.
    """

    layouts: Sequence[Layout]
    only: Sequence[str]
    device: str
    out: Path
    timeout: float


class Terminal:
    """The terminal of a rank, whose standard output and error go to a log file.

    Megatron prints pages per run, on every rank.
    """

    def __init__(self) -> None:
        self._out = os.dup(1)
        self._before = os.dup(1), os.dup(2)

    def say(self, text: str) -> None:
        """Print a text at once, in one piece."""
        os.write(self._out, f"{text}\n".encode())

    @contextlib.contextmanager
    def redirected(self, log: Path) -> Iterator[None]:
        """Send what this process prints to a file."""
        with log.open("wb") as file:
            sys.stdout.flush()
            for number in (1, 2):
                os.dup2(file.fileno(), number)
            try:
                yield
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                for number, original in zip((1, 2), self._before, strict=True):
                    os.dup2(original, number)


def _bind_device(wanted: str) -> str:
    """Select this rank's GPU. Returns cuda or cpu.

    Raises:
        ValueError: if there is no GPU for this rank.
    """
    device = launch.wanted_device(["--llr-device", wanted])
    if device == "cpu":
        return device
    local, ranks = int(os.environ["LOCAL_RANK"]), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    gpus = torch.cuda.device_count()
    if ranks > gpus:
        raise input_error(
            f"{ranks} ranks on a node with {gpus} GPUs. There must be a GPU for every rank: use "
            f"--nproc-per-node {gpus}, or --device cpu."
        )
    torch.cuda.set_device(local)
    return device


def _connect(options: Options) -> tuple[Any, int, int]:
    """The store of all ranks, this rank, the number of ranks."""
    store, rank, ranks = next(
        iter(rendezvous("env://", timeout=timedelta(seconds=options.timeout)))
    )
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return PrefixStore(f"self-test-{attempt}", store), rank, ranks


class SelfTest:
    """The self-test on this rank.

    Args:
        options: of the command line.
        terminal: of this rank.
    """

    def __init__(self, options: Options, terminal: Terminal) -> None:
        self._options, self._terminal = options, terminal
        self._begun = time.monotonic()
        self._store, self._rank, self._ranks = _connect(options)
        self._results = Results(self._ranks)
        self._progress = Progress(
            self._store, self._rank, self._ranks, options.timeout, self._stopped
        )
        self._logs = options.out.with_suffix(".logs")
        self._folder: Path | None = None

    def run(self) -> int:
        """Check everything. Returns the exit code.

        Raises:
            ValueError: on all ranks, if there are too few GPUs or the output cannot be written.
        """
        try:
            self._results.device = self._agreed(
                "device", lambda: _bind_device(self._options.device)
            )
            self._folder = self._shared_folder()
            try:
                self._logs.mkdir(parents=True, exist_ok=True)
                with self._terminal.redirected(self._logs / f"rank-{self._rank}.log"):
                    self._run_rows(self._folder)
            finally:
                if self._rank == 0:
                    shutil.rmtree(self._folder, ignore_errors=True)
            return self._end()
        except ValueError:
            self._progress.close()
            raise

    def _agreed(self, name: str, step: Callable[[], str]) -> str:
        """The common result of a step that may fail on some ranks.

        Raises:
            ValueError: on all ranks, if it fails on one or results differ.
        """
        result, error = "", ""
        try:
            result = step()
        except ValueError as failed:
            error = str(failed)
        answers = self._progress.collect(name, [result, error])
        for rank, (_, text) in enumerate(answers):
            if text:
                raise ValueError(f"{text} (rank {rank})")
        for rank, (other, _) in enumerate(answers):
            if other != answers[0][0]:
                raise input_error(
                    f"The {name} is {answers[0][0]} on rank 0 and {other} on rank {rank}. It must "
                    "be the same on all ranks."
                )
        return result

    def _say(self, text: str) -> None:
        if self._rank == 0:
            self._terminal.say(text)

    def _shared_folder(self) -> Path:
        """A temporary folder next to the JSON file, for checkpoints; the same one on every rank."""
        parent, name = self._options.out.parent, ""
        if self._rank == 0:
            with contextlib.suppress(OSError):
                parent.mkdir(parents=True, exist_ok=True)
                name = tempfile.mkdtemp(prefix=".self-test-", dir=parent)
        folder = Path(self._progress.collect("folder", name)[0])
        seen = self._progress.collect("folder is shared", bool(folder.name) and folder.is_dir())
        if not all(seen):
            ranks = spelled([rank for rank, visible in enumerate(seen) if not visible])
            raise input_error(
                f"The folder of --out, {parent}, is not writable on rank 0 or not shared with "
                f"{ranks}. It must be on a file system of all nodes: choose another --out."
            )
        return folder

    def _initialize(self) -> None:
        """Initialize the process group; Megatron uses it."""
        how: dict[str, Any] = {"rank": self._rank, "world_size": self._ranks}
        # The watchdog must be first.
        how["timeout"] = timedelta(seconds=self._options.timeout + 300)
        # As Megatron does: without a device, so that NCCL connects at first use.
        backend = "nccl" if self._results.device == "cuda" else "gloo"
        dist.init_process_group(backend, store=PrefixStore("groups", self._store), **how)

    def _run_rows(self, folder: Path) -> None:
        device = self._results.device
        self._progress.mark("environment")
        facts = self._progress.collect("environment", environment.describe(device))
        self._report_environment(facts)
        words: list[str] = []

        def prepare() -> str:
            words.extend(launch.prepare_device(["--llr-device", device]))
            return ""

        self._agreed("preparation", prepare)
        self._progress.mark("process group")
        self._initialize()
        self._progress.mark("import of Megatron")
        # After the device is prepared.
        from megatron_llr.tools.self_test.checks import Checks, Reference

        references: dict[str, Reference] = {}
        self._results.rows = [Row(each.name, each.model) for each in self._options.layouts]
        for layout, row in zip(self._options.layouts, self._results.rows, strict=True):
            begun = time.monotonic()
            reference = references.setdefault(layout.model, Reference(folder / layout.model))
            row.flags = training_flags(layout, self._ranks)
            row.flags += environment.device_flags(layout, facts[0], device)
            reason = environment.unavailable(layout, facts[0], device)
            if reason is not None:
                row.set_all("not applicable", reason)
            else:
                command = [*words, *row.flags]
                work = folder / layout.name
                checks = Checks(layout, command, work, reference, self._progress, row)
                chosen = not self._options.only or layout.name in self._options.only
                checks.run() if chosen else checks.save_reference()
            row.seconds = time.monotonic() - begun
            done = ", ".join(f"{name} {row.cells[name].status}" for name in CHECKS)
            self._say(f"{row.layout}: {done} ({row.seconds:.1f} s)")

    def _report_environment(self, facts: Sequence[dict[str, Any]]) -> None:
        results = self._results
        results.environment = facts[0]
        results.hosts = [each["machine"]["host"] for each in facts]
        results.problems += environment.differences(facts)
        nodes = len(set(results.hosts))
        self._say(f"ranks: {self._ranks}, nodes: {nodes}, device: {results.device}")
        versions = {**facts[0]["software"], **facts[0]["machine"]}
        del versions["host"], versions["variables"]
        self._say(", ".join(f"{name} {value or 'none'}" for name, value in versions.items()))
        for each in facts[0]["missing"]:
            self._say(
                f"  {each['package']} ({each['part']}): {each['reason']}; for {each['needed for']}"
            )
        for problem in results.problems:
            self._say(f"FAILED: {problem}")

    def _end(self) -> int:
        self._progress.mark("end")
        results = self._results
        if self._rank == 0:
            self._finish()
        self._progress.collect("end", None)
        self._progress.close()
        if dist.is_initialized():
            dist.destroy_process_group()
        return 1 if results.failed else 0

    def _finish(self) -> None:
        """Print the table and write the JSON file: on rank 0, or on the rank that stops the job."""
        results = self._results
        results.seconds = time.monotonic() - self._begun
        results.write(self._options.out)
        self._terminal.say(f"\n{table(results.rows)}")
        kept = f", logs of the ranks in {self._logs}" if results.failed else ""
        outcome = "FAILED" if results.failed else "ok"
        self._terminal.say(f"\n{outcome} after {results.seconds:.0f} s: {self._options.out}{kept}")
        if not results.failed:
            shutil.rmtree(self._logs, ignore_errors=True)

    def _stopped(self, message: str) -> None:
        """Called by the watchdog of one rank, before all processes exit."""
        self._results.problems.append(message)
        self._terminal.say(f"FAILED: {message}")
        unfinished = [
            row
            for row in self._results.rows
            if any(cell.status == "not run" for cell in row.cells.values())
        ]
        for row in unfinished[:1]:
            row.set_all("FAILED", "the job was stopped in this row")
        for row in unfinished[1:]:
            row.set_all("not run", "the job was stopped before")
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._finish()
