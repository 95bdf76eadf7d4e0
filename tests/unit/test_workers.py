"""The worker processes of tools/preprocess_data.py, and what happens when one dies."""

import os
import signal
import stat
import struct
import subprocess
import sys
import time
from concurrent.futures import Future
from pathlib import Path

import psutil
import pytest

from megatron_llr.tools.preprocess.workers import WorkerPool

ROOT = Path(__file__).resolve().parents[2]
# Much more than a pipe holds.
LARGE = 1 << 24


def running_workers() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if "spawn_main" in str(child.cmdline())]


def reverse(item: bytes) -> bytes:
    if item == b"bad":
        raise LookupError("no such item", item)
    return item[::-1]


def die(item: str) -> bytes:
    """Die in the way that the item names."""
    if item == "never":
        return bytes(LARGE)
    if item == "exit":
        os._exit(3)
    if item == "while it writes":
        # A message of which only the first byte arrives.
        (pipe,) = (fd for fd in _open_files() if stat.S_ISSOCK(os.fstat(fd).st_mode))
        os.write(pipe, struct.pack("!i", 1000) + b"x")
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def _open_files() -> list[int]:
    # The folder itself is listed too, and is closed by then.
    return [int(fd) for fd in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{fd}")]


def test_results_arrive_and_errors_keep_their_type_and_traceback() -> None:
    items = [bytes([number]) * 100 + b"end" for number in range(50)] + [bytes(LARGE)]
    with WorkerPool(3, reverse) as pool:
        futures = [pool.submit(item) for item in items]
        bad = pool.submit(b"bad")
        assert [future.result() for future in futures] == [item[::-1] for item in items]
        with pytest.raises(LookupError, match="no such item") as raised:
            bad.result()
        assert "in reverse" in raised.value.__notes__[0]
        assert pool.submit(b"ab").result() == b"ba"
    assert not running_workers()


@pytest.mark.parametrize(
    ("item", "how"),
    [
        ("while it runs", "was killed by SIGKILL"),
        ("while it writes", "was killed by SIGKILL"),
        ("exit", "exited with 3"),
    ],
)
def test_a_dead_worker_is_an_error_while_others_run(item: str, how: str) -> None:
    with WorkerPool(2, die) as pool:
        futures: list[Future[bytes]] = [pool.submit("never"), pool.submit(item)]
        futures += [pool.submit("never") for _ in range(20)]
        with pytest.raises(ValueError, match=f"A worker process {how}.*set a smaller --workers"):
            futures[1].result(timeout=120)


def test_workers_killed_at_random_times_never_block() -> None:
    for attempt in range(5):
        with WorkerPool(2, die) as pool:
            futures = [pool.submit("never") for _ in range(200)]
            futures[0].result(timeout=120)
            time.sleep(0.003 * attempt)
            running_workers()[0].kill()
            errors = [future.exception(timeout=120) for future in futures]
        assert any("was killed by SIGKILL" in str(error) for error in errors)


def test_workers_end_when_the_with_block_is_left_while_they_run() -> None:
    def stop() -> None:
        with WorkerPool(2, time.sleep) as pool:
            for _ in range(10):
                pool.submit(1000)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stop()
    assert not running_workers()


def hold() -> None:
    """Print the workers' process ids, and wait."""
    with WorkerPool(2, time.sleep) as pool:
        pool.submit(1)
        print(*(worker.pid for worker in running_workers()), flush=True)
        time.sleep(1000)


def test_workers_end_when_the_main_process_is_killed() -> None:
    """The first runs, the second waits for an item."""
    program = f"from {hold.__module__} import hold; hold()"
    main = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE)
    assert main.stdout is not None
    workers = [psutil.Process(int(word)) for word in main.stdout.readline().split()]
    main.kill()
    main.communicate()
    assert len(workers) == 2
    assert not psutil.wait_procs(workers, timeout=120)[1]
