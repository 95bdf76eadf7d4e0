"""Python programs in forks of the test process: without the seconds that their imports take.

A fork has its own signals, limits, output and exit code, as a started interpreter has. What a
program imports must already be imported here, or costs its time again in every fork. Tests of
signals and of the start itself start an interpreter.
"""

import contextlib
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import IO, NoReturn


def run_forked(
    arguments: Sequence[object],
    *,
    cwd: Path,
    env: Mapping[str, str],
    stdin: IO[bytes] | bytes = b"",
    limit: Callable[[], None] | None = None,
    timeout: float = 1800,
) -> "subprocess.CompletedProcess[str]":
    """As `subprocess.run([sys.executable, *arguments], capture_output=True, text=True)`.

    Args:
        arguments: a script or `-c` and a program, then its arguments.
        cwd: working directory.
        env: all its environment variables. Those that are read at import have no effect.
        stdin: standard input, or its content.
        limit: called in the fork before the program.
        timeout: seconds, after which it is killed.

    Raises:
        subprocess.TimeoutExpired: if it was killed.
    """
    words = list(map(str, arguments))
    with contextlib.ExitStack() as files:
        streams = [files.enter_context(tempfile.TemporaryFile()) for _ in range(3)]
        if isinstance(stdin, bytes):
            streams[0].write(stdin)
            streams[0].seek(0)
        else:
            streams[0] = stdin
        child = os.fork()
        if child == 0:
            _become(words, cwd, env, [stream.fileno() for stream in streams], limit)
        end = time.monotonic() + timeout
        while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0):
            if time.monotonic() > end:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                raise subprocess.TimeoutExpired(words, timeout)
            time.sleep(0.005)
        texts = []
        for stream in streams[1:]:
            stream.seek(0)
            texts.append(stream.read().decode())
    return subprocess.CompletedProcess(words, os.waitstatus_to_exitcode(ended[1]), *texts)


def _become(
    words: list[str],
    cwd: Path,
    env: Mapping[str, str],
    streams: Sequence[int],
    limit: Callable[[], None] | None,
) -> NoReturn:
    """Run the program in this fork and end it, without pytest's own handlers at exit."""
    code = 1
    try:
        for target, source in enumerate(streams):
            os.dup2(source, target)
        sys.stdin, sys.stdout, sys.stderr = (
            open(number, mode, closefd=False)  # noqa: SIM115
            for number, mode in enumerate("rww")
        )
        os.chdir(cwd)
        os.environ.clear()
        os.environ.update(env)
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if limit is not None:
            limit()
        code = _run(words)
    except BaseException:
        traceback.print_exc(file=sys.stderr)
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)


def _run(words: list[str]) -> int:
    """The program's exit code."""
    try:
        if words[0] == "-c":
            sys.argv = ["-c", *words[2:]]
            main = sys.modules["__main__"] = ModuleType("__main__")
            exec(words[1], main.__dict__)
        else:
            sys.argv = words
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    return 0
