"""How the final loss depends on the learning rate of each role: the sensitivity sweep."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_llr.tools.compare.grid import Grid
from megatron_llr.tools.compare.results import Result
from megatron_llr.tools.compare.statistics import Difference, difference_of


@dataclass(frozen=True)
class RoleSensitivity:
    """The sweep of one role.

    Attributes:
        role: the role.
        slope: d loss / d ln rate at the base policy, mean over the seeds.
        changes: factor -> change of the final loss, mean over the seeds; infinite if one diverged.
    """

    role: str
    slope: Difference
    changes: Mapping[float, Difference]


def _slope(losses: Mapping[float, float]) -> float:
    """Derivative in ln factor at factor 1 of a parabola, or with one factor of a line."""
    logs = [math.log(factor) for factor in losses]
    return float(np.polyfit(logs, list(losses.values()), min(2, len(losses) - 1))[-2])


def role_sensitivities(grid: Grid, results: Sequence[Result]) -> list[RoleSensitivity]:
    """One entry per role with finished runs, the steepest first.

    Args:
        grid: the grid.
        results: all finished runs, those of the base policy included.
    """
    if grid.sensitivity is None:
        return []
    scaled = [result for result in results if result.run.role]
    rates = {(result.run.iterations, result.run.learning_rate) for result in scaled}
    base = {
        result.run.seed: result.final
        for result in results
        if not result.run.role
        and result.run.policy == grid.sensitivity.policy
        and (result.run.iterations, result.run.learning_rate) in rates
    }
    by_role: dict[str, dict[float, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for result in scaled:
        if result.run.seed in base:
            by_role[result.run.role][result.run.factor][result.run.seed] = result.final
    sensitivities = []
    for role, by_factor in by_role.items():
        complete = [seed for seed in base if all(seed in by_seed for by_seed in by_factor.values())]
        slopes = {
            seed: _slope({1.0: base[seed], **{f: by_factor[f][seed] for f in by_factor}})
            for seed in complete
            if all(math.isfinite(by_factor[factor][seed]) for factor in by_factor)
        }
        sensitivities.append(
            RoleSensitivity(
                role,
                difference_of(slopes, dict.fromkeys(slopes, 0.0)),
                {factor: difference_of(by_factor[factor], base) for factor in sorted(by_factor)},
            )
        )
    # A slope that is unknown comes last.
    return sorted(sensitivities, key=lambda s: -abs(s.slope.value) if s.slope.count else 0.0)
