"""The ramps of the official code (golden traces): a straight line in the learning rate.

The package changes the multiplier linearly and follows the base schedule exactly. The official
trainer changes the learning rate linearly, towards the base rate at the end of the ramp.
"""

from collections.abc import Callable, Mapping


class OfficialRamps:
    """Learning rates of all matrices, update after update.

    Args:
        ramp: updates of a ramp.
    """

    def __init__(self, ramp: int) -> None:
        self.ramp = ramp
        self._observed_at = 0
        self._targets: dict[str, float] = {}
        self._before: dict[str, float] = {}
        self._rates: dict[str, float] = {}

    def observe(self, s: int, targets: Mapping[str, float]) -> None:
        """Take multipliers that were measured before update s."""
        self._targets = {**self._targets, **targets}
        self._before = dict(self._rates)
        self._observed_at = s

    def learning_rates(self, s: int, base: Callable[[int], float]) -> dict[str, float]:
        """Learning rate of every matrix at update s; call it for consecutive updates."""
        first = self._observed_at - 1
        last = self.ramp if first == 0 else self._observed_at + self.ramp
        if s > last:
            rate = base(s)
            self._rates = {matrix: rate * factor for matrix, factor in self._targets.items()}
        else:
            aim, progress = base(last), (s - first) / (last - first)
            self._rates = {
                matrix: before + (aim * self._targets[matrix] - before) * progress
                for matrix in self._targets
                for before in [self._before.get(matrix, 0.0)]
            }
        return dict(self._rates)
