"""A pool of processes that run one function. The death of a process raises an error at once.

`concurrent.futures.ProcessPoolExecutor` has one pipe for the results of all its processes. If one
of them is killed while it writes a result, the pipe stays open in the others, and the reader waits
forever for the rest. Here each process has its own pipe, which ends with it.
"""

import contextlib
import multiprocessing
import signal
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from multiprocessing.reduction import ForkingPickler
from queue import SimpleQueue
from typing import Any, Self

from megatron_llr.errors import input_error


@dataclass(frozen=True)
class _Worker:
    """A process and the pipe to it."""

    process: SpawnProcess
    pipe: "Connection[Any, Any]"

    def run(self, item: object) -> Any:
        """Send an item and wait for its result; raises what the function raised."""
        try:
            _send(self.pipe, item)
            result, error = self.pipe.recv()
        except (EOFError, OSError):
            raise self._death() from None
        if error is not None:
            raise error
        return result

    def _death(self) -> ValueError:
        self.process.join()
        code = self.process.exitcode or 0
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"
        return input_error(
            f"A worker process {how}. Workers must run to the end. If memory ran out, set a "
            "smaller --workers."
        )


class WorkerPool[Item, Result]:
    """Runs a function in several spawned processes; use it in a `with` statement.

    Spawned, not forked: forking a process with threads, such as torch's, can deadlock.

    Args:
        workers: number of processes.
        function: called in the processes with one item; it and its results must be picklable.
    """

    def __init__(self, workers: int, function: Callable[[Item], Result]) -> None:
        context = multiprocessing.get_context("spawn")
        self._workers: list[_Worker] = []
        self._idle: SimpleQueue[_Worker] = SimpleQueue()
        # One thread per process waits for its results.
        self._threads = ThreadPoolExecutor(workers)
        # Starting it unblocks signals, so it is not left to the first process.
        with _terminal_signals_blocked():
            resource_tracker.ensure_running()
        for _ in range(workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, function), daemon=True)
            with _terminal_signals_blocked():
                process.start()
            # Otherwise this process would keep the worker's end open.
            theirs.close()
            self._workers.append(_Worker(process, ours))
            self._idle.put(self._workers[-1])

    def submit(self, item: Item) -> "Future[Result]":
        """Run the function on the item in the next idle process.

        The future raises what the function raised, or ValueError if the process died.
        """
        return self._threads.submit(self._run, item)

    def _run(self, item: Item) -> Result:
        worker = self._idle.get()
        try:
            result: Result = worker.run(item)
            return result
        finally:
            self._idle.put(worker)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """End all processes, also while they run."""
        for worker in self._workers:
            worker.process.kill()
        self._threads.shutdown(cancel_futures=True)
        for worker in self._workers:
            worker.process.join()
            worker.pipe.close()


@contextlib.contextmanager
def _terminal_signals_blocked() -> Iterator[None]:
    """Processes started in here inherit the mask.

    A terminal signals all processes; only the main process should handle that.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _send(pipe: "Connection[Any, Any]", message: object) -> None:
    # Connection.send() without its buffer, which makes Python print a SystemError if sending fails.
    pipe.send_bytes(bytes(ForkingPickler.dumps(message)))


def _serve(pipe: "Connection[Any, Any]", function: Callable[[Any], object]) -> None:
    """The main loop of a worker; ends with the main process."""
    # The main process closed its end, or died.
    with contextlib.suppress(EOFError, OSError):
        while True:
            item = pipe.recv()
            try:
                answer: tuple[object, Exception | None] = function(item), None
            except Exception as error:
                # A traceback is not pickled, a note is.
                error.add_note(f"In a worker process:\n{traceback.format_exc()}")
                answer = None, error
            _send(pipe, answer)
