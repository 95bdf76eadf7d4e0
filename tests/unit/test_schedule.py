"""Timing: when measurements fall, how multipliers move, what a saved schedule keeps."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_llr import LLRConfig, MultiplierSchedule


def make(total: int = 100, *, start: int = 1, **settings: object) -> MultiplierSchedule:
    values = {"interval": 20, "ramp_iters": 4, "active_fraction": 0.5, **settings}
    return MultiplierSchedule(LLRConfig(**values), total, start=start)  # type: ignore[arg-type]


def test_measurements_fall_at_the_start_and_at_multiples_within_the_window() -> None:
    schedule = make()
    due = []
    for s in range(1, 101):
        if schedule.due(s):
            due.append(s)
            schedule.observe(s, {"m": 2.0})
            assert not schedule.due(s)
    assert due == [1, 20, 40]


def test_first_targets_hold_at_once_and_later_ones_are_ramped_to() -> None:
    schedule = make()
    schedule.observe(1, {"m": 3.0})
    assert schedule.multipliers(1) == {"m": 3.0}
    assert schedule.multipliers(19) == {"m": 3.0}
    schedule.observe(20, {"m": 5.0})
    # m(s+j) = old + (new - old)(j+1)/(ramp+1), ramp 4
    ramp = [schedule.multipliers(20 + j)["m"] for j in range(6)]
    assert ramp == pytest.approx([3.4, 3.8, 4.2, 4.6, 5.0, 5.0])


def test_the_last_ramp_finishes_after_the_window() -> None:
    schedule = make(active_fraction=0.2)
    schedule.observe(1, {"m": 1.0})
    schedule.observe(20, {"m": 2.0})
    assert schedule.window_end == 20
    assert schedule.multipliers(22)["m"] < 2.0
    assert schedule.multipliers(24) == schedule.multipliers(100) == {"m": 2.0}


def test_switched_on_late_the_first_targets_are_ramped_to_from_1() -> None:
    schedule = make(start=31, active_fraction=0.3)
    assert schedule.window_end == 60
    assert schedule.due(31)
    schedule.observe(31, {"m": 2.0})
    assert schedule.multipliers(31)["m"] == pytest.approx(1.2)
    assert schedule.multipliers(35)["m"] == 2.0


def test_a_measurement_inside_a_ramp_starts_from_where_it_stood() -> None:
    schedule = make(start=38)
    schedule.observe(38, {"m": 6.0})
    before = schedule.multipliers(39)["m"]
    schedule.observe(40, {"m": before})
    assert schedule.multipliers(41)["m"] == pytest.approx(before)


def test_a_matrix_without_target_keeps_its_multiplier() -> None:
    schedule = make()
    schedule.observe(1, {"a": 2.0, "b": 3.0})
    schedule.observe(20, {"a": 4.0})
    assert schedule.multipliers(50) == {"a": 4.0, "b": 3.0}


def test_the_learning_rate_is_base_times_multiplier_whatever_the_base() -> None:
    schedule = make()
    schedule.observe(1, {"m": 3.0})
    assert schedule.multipliers(7) == {"m": pytest.approx(3.0)}


@pytest.mark.parametrize(
    ("settings", "start", "flag"),
    [
        ({"active_iters": 10}, 11, "--llr-active-iters"),
        ({"active_fraction": 0.001}, 1, "--llr-active-fraction"),
    ],
)
def test_a_window_without_updates_is_refused(
    settings: dict[str, float], start: int, flag: str
) -> None:
    with pytest.raises(ValueError, match=flag):
        make(start=start, **settings)


def test_a_fraction_written_in_decimals_means_what_it_says() -> None:
    assert make(active_fraction=0.29).window_end == 29


@given(
    interval=st.integers(2, 12),
    ramp=st.integers(0, 11),
    stop=st.integers(1, 59),
    targets=st.lists(st.floats(0.1, 9.0), min_size=60, max_size=60),
)
def test_a_resumed_schedule_is_the_unbroken_one(
    interval: int, ramp: int, stop: int, targets: list[float]
) -> None:
    """Bit for bit, through JSON, wherever it is cut."""
    config = LLRConfig(interval=interval, ramp_iters=min(ramp, interval - 1), active_fraction=0.7)
    unbroken, resumed = MultiplierSchedule(config, 60), MultiplierSchedule(config, 60)
    for s in range(1, 61):
        if s == stop:
            saved = json.loads(json.dumps(resumed.state_dict()))
            resumed = MultiplierSchedule.resume(config, saved)
        for schedule in (unbroken, resumed):
            if schedule.due(s):
                schedule.observe(s, {"m": targets[s - 1]})
        assert unbroken.multipliers(s) == resumed.multipliers(s)
        assert unbroken.due(s) == resumed.due(s)


def test_settled_tells_when_nothing_moves() -> None:
    schedule = make()
    schedule.observe(1, {"m": 3.0})
    schedule.observe(20, {"m": 5.0})
    for s in range(20, 60):
        same = s > 20 and schedule.multipliers(s) == schedule.multipliers(s - 1)
        assert schedule.settled(s) == same
