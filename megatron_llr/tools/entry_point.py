"""How all command-line tools end on a signal or a closed pipe."""

import contextlib
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import NoReturn

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(KeyboardInterrupt):
    """Raised in the main thread by the first signal; `with` blocks then remove partial output."""


def run_tool(main: Callable[[], int]) -> int:
    """Run a tool without tracebacks for signals and closed pipes.

    After the first signal further ones are ignored, so that they cannot interrupt the cleanup:
    shells send SIGHUP twice. A signal that is already ignored stays so, as SIGHUP under nohup.

    Args:
        main: the tool; returns an exit code.

    Returns:
        The tool's exit code; 128 + the signal's number after SIGINT (130), SIGTERM (143) or SIGHUP
        (129); 141 if the reader of a pipe closed it.
    """
    received: list[int] = []

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        for each in _SIGNALS:
            signal.signal(each, signal.SIG_IGN)
        received.append(number)
        raise Stopped

    for number in _SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, stop)
    try:
        try:
            code = main()
        finally:
            # Here and not at exit, where an error could not be caught.
            sys.stdout.flush()
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    except BrokenPipeError:
        code = 128 + signal.SIGPIPE
        _discard_output()
    if not received:
        return code
    # A library may have turned the exception into another one, and the tool into an error.
    with contextlib.suppress(OSError):
        name = signal.Signals(received[0]).name
        print(f"{Path(sys.argv[0]).name}: stopped by {name}", file=sys.stderr, flush=True)
    return 128 + received[0]


def _discard_output() -> None:
    """Let Python flush its streams at exit without a second error."""
    devnull = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            os.dup2(devnull, stream.fileno())
