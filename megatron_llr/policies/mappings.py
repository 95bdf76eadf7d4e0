"""How exponents become multipliers.

A mapping is fitted to the exponents of a pool of matrices and then answers for any exponent. A
larger exponent (weaker tail) gives a larger multiplier; inverted, a smaller one. Formulas:
Layer-wise-Learning-Rate, olmo/LRUnbalance.py; `a` is an exponent, `n` the size of the pool.
"""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

Scale = Callable[[float], float]

_SIGMOID_SLOPE = 4.0


@dataclass(frozen=True)
class Bounds:
    """What a mapping may use besides the pool.

    Attributes:
        low: multiplier of the smallest exponent.
        high: multiplier of the largest exponent.
        quantile: share of the pool that is clipped at either end.
        inverse: give the smallest exponent the largest multiplier.
    """

    low: float
    high: float
    quantile: float = 0.0
    inverse: bool = False


Mapping = Callable[[Sequence[float], Bounds], Scale | None]
"""Exponents of the pool and bounds -> multiplier of an exponent. None where the pool tells nothing
apart (all exponents equal)."""


def _line(first: float, last: float, bounds: Bounds) -> Scale | None:
    if not last > first:
        return None
    ends = [bounds.high, bounds.low] if bounds.inverse else [bounds.low, bounds.high]
    return lambda alpha: float(np.interp(alpha, [first, last], ends))


def linear(pool: Sequence[float], bounds: Bounds) -> Scale | None:
    """Straight line from (min a, low) to (max a, high), flat outside (the published results)."""
    return _line(min(pool), max(pool), bounds)


def quantile(pool: Sequence[float], bounds: Bounds) -> Scale | None:
    """`linear` between two quantiles of the pool: one outlier does not stretch the scale."""
    first, last = np.quantile(pool, [bounds.quantile, 1 - bounds.quantile])
    return _line(float(first), float(last), bounds)


def _relative_to_mean(
    pool: Sequence[float], bounds: Bounds, transform: Callable[[float], float]
) -> Scale | None:
    mean = sum(transform(alpha) for alpha in pool) / len(pool)
    if not mean > 0:
        return None
    if bounds.inverse:
        return lambda alpha: mean / transform(alpha)
    return lambda alpha: transform(alpha) / mean


def sqrt(pool: Sequence[float], bounds: Bounds) -> Scale | None:
    """Root of a over the pool's mean root; low and high are not used."""
    return _relative_to_mean(pool, bounds, math.sqrt)


def log2(pool: Sequence[float], bounds: Bounds) -> Scale | None:
    """Binary logarithm of a over the pool's mean one; low and high are not used.

    Inverted, the official code multiplies by n where it should divide; this divides.
    """
    return _relative_to_mean(pool, bounds, math.log2)


def sigmoid(pool: Sequence[float], bounds: Bounds) -> Scale | None:
    """2 / (1 + exp(-4 z)), z the standard score of a in the pool; low and high are not used."""
    mean, deviation = float(np.mean(pool)), float(np.std(pool))
    if not deviation > 0:
        return None
    slope = -_SIGMOID_SLOPE if bounds.inverse else _SIGMOID_SLOPE
    return lambda alpha: 2.0 / (1.0 + math.exp(-slope * (alpha - mean) / deviation))


def rank(pool: Sequence[float], bounds: Bounds) -> Scale | None:
    """Equal steps by rank from low up to, not including, high: only the order counts."""
    ordered, count = sorted(pool), len(pool)
    step = (bounds.high - bounds.low) / count
    if bounds.inverse:
        return lambda alpha: bounds.low + step * (count - bisect_right(ordered, alpha))
    return lambda alpha: bounds.low + step * min(bisect_left(ordered, alpha), count - 1)


MAPPINGS: dict[str, Mapping] = {
    "linear": linear,
    "quantile": quantile,
    "sqrt": sqrt,
    "log2": log2,
    "sigmoid": sigmoid,
    "rank": rank,
}

# Mappings whose multipliers stay between low and high; the others ignore the bounds.
BOUNDED = frozenset({"linear", "quantile", "rank"})
