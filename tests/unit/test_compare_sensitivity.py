"""Slopes of the loss in the logarithm of a role's rate, from losses with known slopes."""

import math
from pathlib import Path

import pytest

from megatron_llr.tools.compare.grid import Grid, Sensitivity
from megatron_llr.tools.compare.results import Result
from megatron_llr.tools.compare.sensitivity import role_sensitivities

SLOPES = {"embedding": -0.05, "k": 0.02, "down": 0.0}


def grid_of(*factors: float) -> Grid:
    return Grid(
        out=Path("out"),
        flags=tuple("--seq-length 16 --global-batch-size 4".split()),
        policies={"uniform": ("--llr-policy", "uniform")},
        learning_rates=(1e-3,),
        iterations=(10,),
        seeds=(1, 2, 3),
        sensitivity=Sensitivity(factors=factors, policy="uniform"),
    )


def result_of(grid: Grid, seed: int, loss: float, role: str = "", factor: float = 1.0) -> Result:
    run = grid.run("uniform", 10, 1e-3, seed, role=role, factor=factor)
    return Result(run, 9.0, ((10, loss),), math.isinf(loss), 1.0, {})


def sweep(grid: Grid, noise: float = 0.0) -> list[Result]:
    """A parabola of curvature 0.1 with the role's slope at 1; seeds differ by a constant."""
    results = [result_of(grid, seed, 2.0 + seed) for seed in grid.seeds]
    for role, slope in SLOPES.items():
        for factor in grid.sensitivity.factors if grid.sensitivity else ():
            for seed in grid.seeds:
                x = math.log(factor)
                loss = 2.0 + seed + slope * x + 0.1 * x * x + noise * (seed - 2) * x
                results.append(result_of(grid, seed, loss, role, factor))
    return results


def test_slopes_are_those_of_a_parabola_through_all_factors() -> None:
    grid = grid_of(0.7, 1.3)
    found = role_sensitivities(grid, sweep(grid))
    assert [each.role for each in found] == ["embedding", "k", "down"]
    for each in found:
        assert each.slope.value == pytest.approx(SLOPES[each.role], abs=1e-9)
        x = math.log(0.7)
        assert each.changes[0.7].value == pytest.approx(SLOPES[each.role] * x + 0.1 * x * x)
        assert each.slope.count == 3


def test_the_interval_is_that_of_the_seeds() -> None:
    grid = grid_of(0.7, 1.3)
    for each in role_sensitivities(grid, sweep(grid, noise=0.01)):
        # Slopes of the seeds differ by -0.01, 0 and 0.01: t(0.975, 2) 0.01 / sqrt(3).
        half = 4.302653 * 0.01 / math.sqrt(3)
        assert each.slope.high - each.slope.value == pytest.approx(half, rel=1e-5)


def test_a_diverged_run_has_no_slope_and_a_missing_one_leaves_its_seed_out() -> None:
    grid = grid_of(0.7, 1.3)
    results = [
        result
        for result in sweep(grid)
        if (result.run.role, result.run.seed, result.run.factor) != ("k", 3, 1.3)
    ]
    results += [result_of(grid, 1, math.inf, "head", 1.3), result_of(grid, 1, 3.0, "head", 0.7)]
    by_role = {each.role: each for each in role_sensitivities(grid, results)}
    assert by_role["k"].slope.count == 2
    assert by_role["k"].slope.value == pytest.approx(0.02, abs=1e-9)
    assert by_role["head"].slope.count == 0
    assert math.isinf(by_role["head"].changes[1.3].value)
    assert role_sensitivities(grid, []) == []
