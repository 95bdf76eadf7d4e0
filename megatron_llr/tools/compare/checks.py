"""What makes a run no fair comparison: it differs from the control in more than its policy."""

import math
from collections.abc import Sequence

from megatron_llr.tools.compare.flags import beyond_policy
from megatron_llr.tools.compare.grid import Grid
from megatron_llr.tools.compare.results import Result

# One machine gives one loss to the bit; other kernels or layouts round, other data differ by far
# more.
_SAME_START = 1e-5


def _flag_lines(grid: Grid) -> list[str]:
    control = grid.policies[grid.control]
    return [
        f"{policy} differs from {grid.control} in {', '.join(differing)}"
        for policy, words in grid.policies.items()
        if (differing := beyond_policy([*grid.flags, *words], [*grid.flags, *control]))
    ]


def _start_lines(grid: Grid, results: Sequence[Result]) -> list[str]:
    """Runs of one seed begin with one batch and one set of weights: with one loss."""
    lines = []
    for seed in grid.seeds:
        # A loss that was not logged is NaN.
        mine = [r for r in results if r.run.seed == seed and not math.isnan(r.first_loss)]
        of_control = [result for result in mine if result.run.policy == grid.control]
        if not of_control:
            continue
        expected = of_control[0].first_loss
        lines += [
            f"{result.run}: loss {result.first_loss:.7g} at update 1, the control's "
            f"{expected:.7g}: other data or other initial weights"
            for result in mine
            if not math.isclose(result.first_loss, expected, rel_tol=_SAME_START)
        ]
    return lines


def _evaluation_lines(results: Sequence[Result]) -> list[str]:
    """Finished runs are evaluated at the same updates."""
    whole = [result for result in results if not result.diverged]
    points = {tuple(iteration for iteration, _ in result.curve) for result in whole}
    if len(points) <= 1:
        return []
    return [f"runs are evaluated at different updates: {sorted(points, key=len)[0]} and others"]


def _environment_lines(results: Sequence[Result]) -> list[str]:
    lines = []
    for name in sorted({name for result in results for name in result.environment}):
        found = sorted({result.environment.get(name, "none") for result in results})
        if len(found) > 1:
            lines.append(f"runs were made with different {name}: {', '.join(found)}")
    return lines


def flagged(grid: Grid, results: Sequence[Result]) -> list[str]:
    """A line for everything in which runs differ beyond their policy, rate and seed."""
    return [
        *_flag_lines(grid),
        *_start_lines(grid, results),
        *_evaluation_lines(results),
        *_environment_lines(results),
    ]
