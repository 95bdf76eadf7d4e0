"""Means, standard errors, differences with confidence intervals; when a curve reaches a loss."""

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
    """A mean difference with its confidence interval, NaN bounds where there is none."""

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


def student_cdf(t: float, freedom: float) -> float:
    """P(T <= t) of Student's t with `freedom` degrees of freedom, to about 1e-10.

    With t = sqrt(freedom) tan(u) the density is proportional to cos(u)^(freedom - 1), smooth on a
    finite interval: Simpson's rule on 2,000 panels.
    """
    end = math.atan(abs(t) / math.sqrt(freedom))
    panels = 2000
    step = end / panels
    total = 0.0
    for index in range(panels + 1):
        weight = 1 if index in (0, panels) else 4 if index % 2 else 2
        total += weight * math.cos(index * step) ** (freedom - 1)
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(math.pi)
    half = scale * total * step / 3
    return 0.5 + math.copysign(half, t)


def student_quantile(probability: float, freedom: float) -> float:
    """The t with P(T <= t) = `probability` (0.5 to 1), by bisection."""
    low, high = 0.0, 1.0
    while student_cdf(high, freedom) < probability:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if student_cdf(middle, freedom) < probability else (low, middle)
    return (low + high) / 2


def difference_of(
    ours: Mapping[int, float], theirs: Mapping[int, float], confidence: float = 0.95
) -> Difference:
    """Mean of ours - theirs.

    On the seeds that are in both, seed by seed: what a seed does to both cancels. One such seed
    gives no interval. Without any, Welch's interval for two samples, with his degrees of freedom.

    Args:
        ours: seed -> loss.
        theirs: seed -> loss.
        confidence: of the interval.
    """
    common = sorted(ours.keys() & theirs.keys())
    if common:
        found = mean_of([ours[seed] - theirs[seed] for seed in common])
        error, freedom, count = found.error, float(found.count - 1), found.count
        value, paired = found.value, True
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


def mean_curve(curves: Sequence[Curve]) -> list[tuple[int, Mean]]:
    """Mean over seeds at the iterations that all curves have."""
    if not curves:
        return []
    found = [dict(curve) for curve in curves]
    common = sorted(set.intersection(*(set(curve) for curve in found)))
    return [(iteration, mean_of([curve[iteration] for curve in found])) for iteration in common]


def reaches(curve: Curve, loss: float) -> float | None:
    """Iteration at which a curve first comes down to a loss, on straight lines between evaluations.

    None where it never does. A curve that is below at its first evaluation answers with that one.
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
