"""The rows of unfinished grids: comparisons use shared seeds."""

import math
from collections.abc import Mapping
from pathlib import Path

import pytest

from megatron_llr.tools.compare.aggregate import PolicySummary, effect_differences, summaries_of
from megatron_llr.tools.compare.grid import Grid, Run
from megatron_llr.tools.compare.results import Result

LOW, HIGH = 1e-3, 3e-3
FLAGS = "--seq-length 16 --global-batch-size 4".split()
Losses = Mapping[tuple[str, float], Mapping[int, float]]


def grid_of(*rates: float, policies: tuple[str, ...] = ("uniform", "esd")) -> Grid:
    flags = {name: ("--llr-policy", name.rpartition("-")[2]) for name in policies}
    return Grid(
        out=Path("out"),
        flags=tuple(FLAGS),
        policies=flags,
        learning_rates=rates,
        iterations=(100,),
        seeds=(1, 2, 3),
    )


def results_of(losses: Losses) -> list[Result]:
    """(policy, rate) -> seed -> final loss; all curves begin at 3; infinite: diverged."""
    return [
        Result(
            Run(
                policy=policy,
                iterations=100,
                learning_rate=rate,
                seed=seed,
                settings=(),
                folder=Path(),
                title="",
            ),
            first_loss=5.0,
            curve=((50, 3.0), (100, loss)),
            diverged=math.isinf(loss),
            seconds=1.0,
            environment={},
        )
        for (policy, rate), by_seed in losses.items()
        for seed, loss in by_seed.items()
    ]


def rows(losses: Losses, *rates: float) -> dict[str, PolicySummary]:
    return {row.cell.policy: row for row in summaries_of(grid_of(*rates), results_of(losses))}


def difference(row: PolicySummary) -> float:
    assert row.difference is not None
    return row.difference.value


def test_a_seed_that_one_policy_lacks_is_not_compared() -> None:
    """The policy is better by 0.1 in every seed, and the second seed easier for all."""
    by_policy = rows({("uniform", LOW): {1: 2.5, 2: 2.0}, ("esd", LOW): {1: 2.4}}, LOW)
    esd = by_policy["esd"]
    assert difference(esd) == pytest.approx(-0.1)
    assert esd.difference is not None
    assert math.isnan(esd.difference.low)
    assert esd.speedup is not None
    assert esd.speedup > 1
    assert esd.notes == ("1 of 3 seeds", "compared only on seed 1")
    assert by_policy["uniform"].cell.final.value == 2.25
    assert by_policy["uniform"].speedup == 1.0


def test_a_rate_with_more_seeds_is_not_the_better_for_it() -> None:
    """The policy is worse by 0.1 everywhere; the control's worse rate has one seed more."""
    losses = {
        ("uniform", LOW): {1: 2.9, 2: 2.9},
        ("uniform", HIGH): {1: 2.4},
        ("esd", LOW): {1: 3.0},
        ("esd", HIGH): {1: 2.5},
    }
    by_policy = rows(losses, LOW, HIGH)
    assert by_policy["uniform"].cell.learning_rate == HIGH
    assert difference(by_policy["esd"]) == pytest.approx(0.1)
    assert by_policy["esd"].speedup is None


def test_a_rate_that_lacks_a_seed_is_chosen_if_it_is_better() -> None:
    control = {1: 2.6, 2: 2.7, 3: 2.8}
    losses = {("uniform", LOW): control, ("uniform", HIGH): control, ("esd", LOW): control}
    esd = rows({**losses, ("esd", HIGH): {1: 1.0, 2: 1.0}}, LOW, HIGH)["esd"]
    assert esd.cell.learning_rate == HIGH
    assert difference(esd) == pytest.approx(-1.65)
    assert esd.notes == ("2 of 3 seeds", "compared only on seeds 1, 2")


def test_the_speedup_is_of_the_seeds_of_the_difference() -> None:
    losses = {("uniform", LOW): {1: 2.0, 2: 2.0, 3: 3.0}, ("esd", LOW): {1: 2.1, 2: 2.1}}
    esd = rows(losses, LOW)["esd"]
    assert difference(esd) == pytest.approx(0.1)
    assert (esd.tokens, esd.speedup) == (None, None)


def test_excluded_rates_are_listed() -> None:
    whole = {1: 2.0, 2: 2.0, 3: 2.0}
    losses = {("uniform", LOW): whole, ("uniform", HIGH): {2: 1.0}, ("esd", LOW): {1: 1.9}}
    by_policy = rows(losses, LOW, HIGH)
    # By itself the control has a seed at both rates; compared with the policy, only at one.
    assert by_policy["uniform"].cell.learning_rate == HIGH
    assert difference(by_policy["esd"]) == pytest.approx(-0.1)
    assert by_policy["esd"].notes == (
        "1 of 3 seeds",
        "rates excluded for missing seeds: 0.003 (0 of 3)",
        "rates of the control excluded: 0.003 (1 of 3)",
        "compared only on seed 1",
        "compared with the control at 0.001",
    )


def test_without_a_seed_in_common_there_is_no_difference_without_an_interval() -> None:
    esd = rows({("uniform", LOW): {1: 2.5}, ("esd", LOW): {2: 2.0}}, LOW)["esd"]
    assert (esd.difference, esd.speedup) == (None, None)
    assert esd.notes[-1] == "no seed shared with the control"
    losses = {("uniform", LOW): {1: 2.5}, ("esd", LOW): {2: 2.0, 3: 2.1}}
    assert rows(losses, LOW)["esd"].difference is None


def test_a_rate_at_which_any_seed_diverged_is_the_worst() -> None:
    losses = {
        ("uniform", LOW): {1: 2.5, 2: 2.5},
        ("uniform", HIGH): {1: 2.0, 2: math.inf},
        ("esd", LOW): {1: 2.4},
        ("esd", HIGH): {1: 2.6},
    }
    by_policy = rows(losses, LOW, HIGH)
    assert by_policy["uniform"].cell.learning_rate == LOW
    assert difference(by_policy["esd"]) == pytest.approx(-0.1)


def test_effects_are_of_the_seeds_that_their_policies_share() -> None:
    grid = grid_of(LOW, policies=("uniform", "esd", "esd-random"))
    losses = {("esd", LOW): {1: 2.5, 2: 1.0}, ("esd-random", LOW): {1: 2.6, 3: 1.0}}
    by_effect = {e.meaning: d for e, d in effect_differences(grid, results_of(losses))}
    order = by_effect["their order, against random"]
    assert order is not None
    assert order.value == pytest.approx(-0.1)
    assert list(by_effect) == ["their order, against random"]
