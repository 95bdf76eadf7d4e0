"""The runs of a grid: those of the file, and those that follow from finished ones.

Both the rates that `extend` adds and the runs of the sensitivity sweep follow from the results on
disk, so that a grid that was stopped continues with the same runs.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_llr.telemetry.read_logs import NoMeasurementError, last_measurement
from megatron_llr.tools.compare.grid import Grid, Run
from megatron_llr.tools.compare.results import read_result
from megatron_llr.tools.compare.statistics import mean_of

# Between rates, where the grid has only one.
_STEP = 2.0


@dataclass(frozen=True)
class RateSearch:
    """The search for the best learning rate of a policy at one length.

    Attributes:
        rates: those of the grid and those added, ascending.
        best: the rate of the smallest mean final loss; None while runs of a rate are missing.
        added: number of rates beyond those of the grid.
    """

    rates: tuple[float, ...]
    best: float | None
    added: int

    @property
    def bracketed(self) -> bool:
        """Whether a smaller and a larger rate than the best were tried."""
        return self.best is not None and self.rates[0] < self.best < self.rates[-1]


def rate_search(
    rates: Sequence[float], limit: int, loss_at: Callable[[float], float | None]
) -> RateSearch:
    """Add a rate beyond the best one until the best is bracketed.

    A new rate keeps the ratio of its two neighbors.

    Args:
        rates: learning rates of the grid.
        limit: most rates to add.
        loss_at: rate -> mean final loss, infinite if a run diverged; None if a run is missing.
    """
    tried = sorted(rates)
    while True:
        losses = [loss_at(rate) for rate in tried]
        added = len(tried) - len(rates)
        if any(loss is None for loss in losses):
            return RateSearch(tuple(tried), None, added)
        finite = [math.inf if loss is None else loss for loss in losses]
        search = RateSearch(tuple(tried), tried[finite.index(min(finite))], added)
        if search.bracketed or added >= limit:
            return search
        if search.best == tried[-1]:
            beyond = tried[-1] * (tried[-1] / tried[-2] if len(tried) > 1 else _STEP)
        else:
            beyond = tried[0] * (tried[0] / tried[1])
        # The digits that a folder is named with.
        tried = sorted([*tried, float(f"{beyond:g}")])


def search_of(grid: Grid, policy: str, iterations: int) -> RateSearch:
    """The state of the search for the best rate of a policy, from the finished runs."""

    def loss_at(rate: float) -> float | None:
        finals = []
        for seed in grid.seeds:
            result = read_result(grid.run(policy, iterations, rate, seed))
            if result is None:
                return None
            finals.append(result.final)
        return mean_of(finals).value

    return rate_search(grid.learning_rates, grid.extend, loss_at)


def planned_runs(grid: Grid) -> list[Run]:
    """All runs known so far: more may follow when these have finished."""
    runs = grid.base_runs()
    if grid.extend:
        runs += [
            grid.run(policy, iterations, rate, seed)
            for iterations in grid.iterations
            for policy in grid.policies
            for rate in search_of(grid, policy, iterations).rates
            if rate not in grid.learning_rates
            for seed in grid.seeds
        ]
    return runs + _sensitivity_runs(grid)


def _sensitivity_runs(grid: Grid) -> list[Run]:
    """Runs that scale one role each, at the policy's best rate and the longest length."""
    if grid.sensitivity is None:
        return []
    policy, iterations = grid.sensitivity.policy, grid.iterations[-1]
    search = search_of(grid, policy, iterations)
    if search.best is None:
        return []
    base = grid.run(policy, iterations, search.best, grid.seeds[0])
    return [
        grid.run(policy, iterations, search.best, seed, role=role, factor=factor)
        for seed in grid.seeds
        for role in grid.sensitivity.roles or measured_roles(base.folder)
        for factor in grid.sensitivity.factors
    ]


def measured_roles(folder: Path) -> list[str]:
    """Roles whose rate a sweep scales: embedding, head, and those that a run measured.

    Smaller matrices have multiplier 1 always; where there is no other matrix, no role is scaled.
    """
    try:
        measured = last_measurement(folder)
    except (FileNotFoundError, NoMeasurementError):
        return []
    roles = dict.fromkeys(role for _, role in measured.exponents)
    present = {role for _, role in measured.counts}
    ends = [role for role in ("embedding", "head") if role in present and role not in roles]
    return [*ends, *roles] if roles else []
