"""Progress of all ranks in a store, apart from the collectives, and the watchdog that reads it.

Every rank publishes its position once a second. If a rank makes no progress within the time limit,
one rank names those that hold up the others, and every process exits.
"""

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import timedelta
from typing import Any

from megatron_llr.tools.self_test.positions import (
    Position,
    code_position,
    hang_message,
    responsible,
)

_BEAT = 1.0
# A process that publishes nothing for so many seconds does not run.
_SILENT = 4.0
# For the ranks without an error, to come out of their collectives.
_GRACE = 10.0
# For the rank that reports. A launcher ends all ranks as soon as one exits.
_REPORT = 20.0
_STOP, _REPORTED, _LEFT = "stop", "reported", "left"


class Progress:
    """Publishes this rank's position, and ends the process if the job hangs.

    Args:
        store: of all ranks; cloned, because a connection serves one thread at a time.
        rank: of this process.
        ranks: of the job.
        limit: seconds without progress after which the job is stopped.
        report: called on one rank with the message, before the processes exit with code 1.
    """

    def __init__(
        self, store: Any, rank: int, ranks: int, limit: float, report: Callable[[str], None]
    ) -> None:
        self.rank, self.ranks, self._limit, self._report = rank, ranks, limit, report
        self._store, self._watch = store.clone(), store.clone()
        self._watch.set_timeout(timedelta(seconds=limit))
        self._keys = [f"position/{each}" for each in range(ranks)]
        self._host, self._beat, self._error = socket.gethostname(), 0, ""
        self._marks, self._step, self._moved = 0, "start", time.monotonic()
        self._main = threading.main_thread().ident or 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._thread.start()

    def mark(self, step: str) -> None:
        """Record that this rank enters a step."""
        self._marks, self._step, self._moved = self._marks + 1, step, time.monotonic()

    def collect(self, name: str, value: Any, error: str = "") -> list[Any]:
        """The JSON value of every rank, in rank order. Enter on all ranks, once per name.

        Not a collective: it also works where a collective of the last step failed on some ranks.

        Args:
            name: of the collected values.
            value: of this rank.
            error: of a rank whose step failed. If the others do not come within seconds, because
                they wait for this rank in a collective, the job is stopped.
        """
        self.mark(f"{name}, waiting for the other ranks")
        self._error = error
        self._store.set(f"{name}/{self.rank}", json.dumps(value))
        keys = [f"{name}/{rank}" for rank in range(self.ranks)]
        begun = time.monotonic()
        while not self._store.check(keys):
            time.sleep(0.02)
            if error and time.monotonic() - begun > min(_GRACE, self._limit):
                self._store.set(_STOP, "")
                error = ""
        self._error = ""
        return [json.loads(text) for text in self._store.multi_get(keys)]

    def close(self) -> None:
        """Stop watching. Rank 0 is last, because it may serve the store."""
        self._ended.set()
        self._thread.join()
        self._store.add(_LEFT, 1)
        begun = time.monotonic()
        while self.rank == 0 and self._store.add(_LEFT, 0) < self.ranks:
            time.sleep(0.02)
            if time.monotonic() - begun > _REPORT:
                break

    def _publish(self) -> None:
        self._beat += 1
        code, waits = code_position(sys._current_frames().get(self._main))
        position = Position(
            self.rank, self._host, self._beat, self._marks, self._step, code, waits, self._error
        )
        self._watch.set(self._keys[self.rank], json.dumps(asdict(position)))

    def _positions(self) -> list[Position | None]:
        return [
            Position(**json.loads(self._watch.get(key))) if self._watch.check([key]) else None
            for key in self._keys
        ]

    def _run(self) -> None:
        try:
            while not self._ended.wait(_BEAT):
                self._publish()
                if time.monotonic() - self._moved > self._limit:
                    self._watch.set(_STOP, "")
                if self._watch.check([_STOP]):
                    self._stop_job()
        except RuntimeError as broken:
            if not self._ended.is_set():
                self._report(f"the store of the job does not answer rank {self.rank}: {broken}")
                os._exit(1)

    def _stop_job(self) -> None:
        """Name the ranks that hold up the others, and exit. Does not return."""
        before = self._positions()
        until = time.monotonic() + _SILENT
        while time.monotonic() < until:
            time.sleep(_BEAT)
            self._publish()
        after = self._positions()
        ranks, reason = responsible(before, after)
        beats = {position.rank: position.beat for position in before if position is not None}
        running = [p.rank for p in after if p is not None and p.beat != beats.get(p.rank)]
        until = time.monotonic() + (_REPORT if self.rank != min(running, default=self.rank) else 0)
        while time.monotonic() < until and not self._watch.check([_REPORTED]):
            time.sleep(_BEAT)
            self._publish()
        if not self._watch.check([_REPORTED]):
            self._report(hang_message(ranks, reason, after, self._limit))
            self._watch.set(_REPORTED, "")
        os._exit(1)
