"""Means, standard errors, differences with confidence intervals; where a curve reaches a loss."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Curve = Sequence[tuple[int, float]]
"""(iteration, validation loss), by iteration."""


@dataclass(frozen=True)
class Mean:
    """A mean over seeds; `error` is its standard error, NaN with one seed."""

    value: float
    error: float
    count: int


@dataclass(frozen=True)
class Difference:
    """A mean difference with its confidence interval, whose bounds are NaN if there is none."""

    value: float
    low: float
    high: float
    count: int
    paired: bool


def mean_of(values: Sequence[float]) -> Mean:
    """Mean and standard error: the sample's standard deviation (n - 1) over the root of n."""
    count = len(values)
    if count == 0:
        return Mean(math.nan, math.nan, 0)
    mean = math.fsum(values) / count
    if count == 1 or not math.isfinite(mean):
        return Mean(mean, math.nan, count)
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    return Mean(mean, math.sqrt(variance / count), count)


def student_quantile(probability: float, freedom: float) -> float:
    """Quantile of Student's t with `freedom` degrees of freedom.

    Raises:
        ImportError: if SciPy is not installed.
    """
    try:
        from scipy import stats
    except ImportError as missing:
        raise ImportError(
            "Confidence intervals need SciPy: pip install 'megatron-llr[compare]'"
        ) from missing
    return float(stats.t.ppf(probability, freedom))


def difference_of(
    ours: Mapping[int, float], theirs: Mapping[int, float], confidence: float = 0.95
) -> Difference:
    """Mean of ours - theirs.

    With shared seeds it is paired: the effect of a seed on both cancels. A single shared seed
    gives no interval. Without shared seeds it is Welch's interval for two samples.

    Args:
        ours: seed -> loss.
        theirs: seed -> loss.
        confidence: of the interval.
    """
    common = sorted(ours.keys() & theirs.keys())
    if common:
        mean = mean_of([ours[seed] - theirs[seed] for seed in common])
        error, freedom, count = mean.error, float(mean.count - 1), mean.count
        value, paired = mean.value, True
    else:
        a, b = mean_of(list(ours.values())), mean_of(list(theirs.values()))
        value, paired, count = a.value - b.value, False, min(a.count, b.count)
        error, freedom = math.hypot(a.error, b.error), math.nan
        if count >= 2 and error > 0:
            freedom = error**4 / (a.error**4 / (a.count - 1) + b.error**4 / (b.count - 1))
    if not (math.isfinite(error) and math.isfinite(freedom)):
        return Difference(value, math.nan, math.nan, count, paired)
    half = student_quantile(0.5 + confidence / 2, freedom) * error
    return Difference(value, value - half, value + half, count, paired)


def detectable(deviation: float, count: int, *, power: float = 0.8) -> float:
    """Smallest true difference that a paired t test finds at 5 %, two-sided, with this power.

    Args:
        deviation: standard deviation of the differences of single seeds.
        count: number of seeds.
        power: probability of an interval that excludes 0.

    Returns:
        The difference; NaN with fewer than two seeds.
    """
    if count < 2 or not (math.isfinite(deviation) and deviation > 0):
        return math.nan
    from scipy import optimize, stats

    freedom, quantile = count - 1, student_quantile(0.975, count - 1)

    def missing(shift: float) -> float:
        return float(stats.nct.sf(quantile, freedom, shift)) - power

    # In units of the standard error of the mean.
    shift = optimize.brentq(missing, 0.0, 20 * quantile)
    return float(shift) * deviation / math.sqrt(count)


def mean_curve(curves: Sequence[Curve]) -> list[tuple[int, Mean]]:
    """Mean over seeds at the iterations that all curves have."""
    if not curves:
        return []
    losses = [dict(curve) for curve in curves]
    common = sorted(set.intersection(*(set(curve) for curve in losses)))
    return [(iteration, mean_of([curve[iteration] for curve in losses])) for iteration in common]


def reaches(curve: Curve, loss: float) -> float | None:
    """Iteration at which a curve first reaches a loss, interpolated linearly between evaluations.

    None if it never does; the first evaluation if that is already at or below the loss.
    """
    before: tuple[int, float] | None = None
    for iteration, value in curve:
        if value <= loss:
            if before is None:
                return float(iteration)
            share = (before[1] - loss) / (before[1] - value)
            return before[0] + share * (iteration - before[0])
        before = (iteration, value)
    return None
