"""When spectra are measured and what every multiplier is at every update: a pure state machine.

`s` is the number of an update, from 1. A measurement *at* s precedes update s; from update s on the
multipliers move to its targets over a ramp, so that no learning rate jumps.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from megatron_llr.config import LLRConfig, flag
from megatron_llr.errors import input_error
from megatron_llr.matrices.ids import MatrixId


def window_end(config: LLRConfig, total_updates: int, start: int = 1) -> int:
    """Last update that a measurement may precede.

    Args:
        config: `active_iters` is absolute; without it `active_fraction` of `total_updates`
            counts from `start`, as the published runs count it from 1.
        total_updates: updates of the whole training run.
        start: update at which the extension is switched on.

    Raises:
        ValueError: if no update from `start` on is in the window.
    """
    if config.active_iters is not None:
        end = min(config.active_iters, total_updates)
        setting = f"{flag('active_iters')} {config.active_iters}"
    else:
        # 0.29 * 100 is 28.999999999999996 in binary; the user wrote 29.
        length = math.floor(config.active_fraction * total_updates + 1e-9)
        end = min(start - 1 + length, total_updates)
        setting = f"{flag('active_fraction')} {config.active_fraction}"
    if end < start:
        raise input_error(
            f"{setting} leaves no update to measure before: it ends the window at update {end} of "
            f"{total_updates}, and this run starts at update {start}. The window must reach update "
            f"{start}: raise {setting.split()[0]}, or train longer with --train-iters."
        )
    return end


class MultiplierSchedule:
    """Multipliers of all logical matrices over the updates of a run.

    A target observed at s is reached by `m(s+j) = old + (new - old)(j+1)/(ramp+1)`, j = 0..ramp;
    one observed at update 1 holds at once, and so does a target of 0. The last ramp finishes after
    the window; then the multipliers stay. A matrix without a target keeps its multiplier, 1 at
    first.

    Args:
        config: `interval`, `ramp_iters` and the window are read.
        total_updates: updates of the whole training run.
        start: update at which the extension is switched on.

    Raises:
        ValueError: if the window has no update.
    """

    def __init__(self, config: LLRConfig, total_updates: int, *, start: int = 1) -> None:
        self._begin(config, start, window_end(config, total_updates, start))

    def _begin(self, config: LLRConfig, start: int, window_end: int) -> None:
        self.interval = config.interval
        self.ramp = config.ramp_iters
        self.start = start
        self.window_end = window_end
        self._observed_at: int | None = None
        self._current_ramp = self.ramp
        self._old: dict[MatrixId, float] = {}
        self._new: dict[MatrixId, float] = {}

    def due(self, s: int) -> bool:
        """Whether a measurement precedes update s."""
        if not self.start <= s <= self.window_end or s == self._observed_at:
            return False
        return self._observed_at is None or s % self.interval == 0

    def observe(self, s: int, targets: Mapping[MatrixId, float]) -> None:
        """Take new targets, measured before update s. A target of 0 holds at once."""
        assert all(math.isfinite(target) and target >= 0 for target in targets.values()), targets
        before = self.multipliers(s - 1) if self._observed_at is not None else {}
        self._new = {**self._new, **targets}
        first_of_run = s == 1
        self._old = {
            matrix: target if first_of_run or target == 0 else before.get(matrix, 1.0)
            for matrix, target in self._new.items()
        }
        self._observed_at = s
        self._current_ramp = self.ramp

    @property
    def targets(self) -> dict[MatrixId, float]:
        """Multipliers at the end of the last ramp."""
        return dict(self._new)

    def settled(self, s: int) -> bool:
        """Whether the multipliers of update s are those of update s - 1."""
        if self._observed_at is None:
            return True
        return s != self._observed_at and self._progress(s - 1) >= 1.0

    @property
    def measured_at(self) -> int | None:
        """Update that the last measurement preceded."""
        return self._observed_at

    def ramp_at(self, s: int) -> tuple[int, int]:
        """Updates of the last ramp up to and including update s, and the length of the ramp."""
        if self._observed_at is None:
            return 0, 0
        length = 1 if self._observed_at == 1 else self._current_ramp + 1
        return min(max(s - self._observed_at + 1, 0), length), length

    def _progress(self, s: int) -> float:
        """Share of the way from old to new at update s, 0 to 1."""
        assert self._observed_at is not None
        return min(1.0, max(0.0, (s - self._observed_at + 1) / (self._current_ramp + 1)))

    def multipliers(
        self, s: int, matrices: Iterable[MatrixId] | None = None
    ) -> dict[MatrixId, float]:
        """Multiplier of every matrix at update s, for s from the last observation on.

        Args:
            s: update, from 1.
            matrices: ids of the matrices, by default all; one without a target is left out.
        """
        if self._observed_at is None:
            return {}
        progress = self._progress(s)
        selected = self._new if matrices is None else [m for m in matrices if m in self._new]
        if progress >= 1.0:
            return {matrix: self._new[matrix] for matrix in selected}
        return {
            matrix: self._old[matrix] + (self._new[matrix] - self._old[matrix]) * progress
            for matrix in selected
        }

    def state_dict(self) -> dict[str, Any]:
        """All that `resume` needs, as plain JSON values."""
        return {
            "start": self.start,
            "window_end": self.window_end,
            "observed_at": self._observed_at,
            "ramp": self._current_ramp,
            "old": {str(matrix): value for matrix, value in self._old.items()},
            "new": {str(matrix): value for matrix, value in self._new.items()},
        }

    @classmethod
    def resume(cls, config: LLRConfig, state: Mapping[str, Any]) -> "MultiplierSchedule":
        """Continue a saved schedule. Its window is kept even if the flags have changed."""
        schedule = cls.__new__(cls)
        schedule._begin(config, int(state["start"]), int(state["window_end"]))
        observed_at = state["observed_at"]
        schedule._observed_at = None if observed_at is None else int(observed_at)
        # A ramp in progress keeps its length, even if --llr-ramp-iters has changed.
        schedule._current_ramp = int(state["ramp"])
        schedule._old = {MatrixId.read(m): float(value) for m, value in state["old"].items()}
        schedule._new = {MatrixId.read(m): float(value) for m, value in state["new"].items()}
        return schedule
