"""Checks that runs differ only in policy, learning rate and seed."""

import math
from collections.abc import Sequence

from megatron_llr.tools.compare.command_flags import beyond_policy
from megatron_llr.tools.compare.grid import Grid
from megatron_llr.tools.compare.results import Result

# Relative. On one machine losses agree to the bit. Different kernels or layouts differ by rounding,
# different data by far more.
_SAME_START = 1e-5


def _start_lines(grid: Grid, results: Sequence[Result]) -> list[str]:
    """Runs of one seed start with the same batch and weights, hence with the same loss."""
    lines = []
    for seed in grid.seeds:
        # A loss that was not logged is NaN.
        mine = [r for r in results if r.run.seed == seed and not math.isnan(r.first_loss)]
        of_control = [result for result in mine if result.run.policy == grid.control]
        if not of_control:
            continue
        expected = of_control[0].first_loss
        lines += [
            f"{result.run}: loss {result.first_loss:.7g} at update 1, but the control has "
            f"{expected:.7g}: its data or initial weights differ"
            for result in mine
            if not math.isclose(result.first_loss, expected, rel_tol=_SAME_START)
        ]
    return lines


def flagged(grid: Grid, results: Sequence[Result]) -> list[str]:
    """One line per difference between runs other than policy, rate and seed.

    Args:
        grid: the grid.
        results: of one training length.
    """
    control = grid.policies[grid.control]
    lines = [
        f"{policy} differs from {grid.control} in {', '.join(differing)}"
        for policy, words in grid.policies.items()
        if (differing := beyond_policy([*grid.flags, *words], [*grid.flags, *control]))
    ]
    lines += _start_lines(grid, results)
    points = {
        tuple(iteration for iteration, _ in result.curve)
        for result in results
        if not result.diverged
    }
    if len(points) > 1:
        lines.append(f"runs are evaluated at different updates: {min(points, key=len)} and others")
    for name in sorted({name for result in results for name in result.environment}):
        values = sorted({result.environment.get(name, "none") for result in results})
        if len(values) > 1:
            lines.append(f"runs used different {name}: {', '.join(values)}")
    return lines
