"""Progress of a long job over files: a bar on a terminal, otherwise a line every ten seconds."""

import sys
import time
from types import TracebackType
from typing import Any, TextIO

_SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Progress over a number of bytes, used as a context manager.

    It is a bar on a terminal if tqdm is installed (transformers depends on it), otherwise a line
    every ten seconds for log files.

    Args:
        total: number of bytes, 0 if unknown, as for a pipe; `expect` can set it later.
        stream: output stream; standard error by default.
    """

    def __init__(self, total: int = 0, stream: TextIO | None = None) -> None:
        self._total = total
        self._stream = stream or sys.stderr
        self._read = 0
        self._next_line = time.monotonic() + _SECONDS_BETWEEN_LINES
        self._bar: Any = None
        if self._stream.isatty():
            try:
                from tqdm import tqdm
            except ImportError:
                return
            self._bar = tqdm(total=total or None, unit="B", unit_scale=True, file=self._stream)

    def expect(self, total: int) -> None:
        """Set the total number of bytes."""
        self._total = total
        if self._bar is not None:
            self._bar.reset(total)

    def advance(self, read: int, note: str) -> None:
        """Add bytes that were read, and print progress with a note."""
        self._read += read
        if self._bar is not None:
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(read)
        elif time.monotonic() >= self._next_line:
            self._next_line += _SECONDS_BETWEEN_LINES
            share = f"{self._read:,} bytes"
            if self._total:
                share = f"{100 * self._read / self._total:5.1f} %"
            print(f"{share} read, {note}", file=self._stream, flush=True)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()
