"""The optimal rate at one number of tokens: a parabola in log rate around the smallest loss.

With x the logarithm of the rate, loss = a_seed + b x + c x^2 is fitted by least squares to the runs
whose rate is within a factor of the best rate. The optimum is x* = -b / 2c. Its interval is
Fieller's: all x at which the slope b + 2 c x is not significantly different from 0. The residual
variance is pooled over all numbers of tokens of a series, which have too few runs each.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_llr.tools.extrapolate_lr.observations import Observation

CONFIDENCE = 0.95
_LEAST_RATES = 3


@dataclass(frozen=True)
class Parabola:
    """A fitted parabola: loss = height + curvature (x - minimum)^2, x the logarithm of the rate.

    Attributes:
        slope: b.
        curvature: c.
        height: mean loss at the minimum, over the seeds.
        covariance: of (b, c) at residual variance 1, [2, 2].
        squares: sum of the squared residuals.
        freedom: its degrees of freedom.
        ends: smallest and largest x that was fitted.
    """

    slope: float
    curvature: float
    height: float
    covariance: Any
    squares: float
    freedom: int
    ends: tuple[float, float]

    @property
    def minimum(self) -> float:
        """x*."""
        return -self.slope / (2 * self.curvature)

    def error(self, variance: float) -> float:
        """Standard error of the minimum by the delta method; NaN for an unknown variance."""
        gradient = np.array([-1.0, self.slope / self.curvature]) / (2 * self.curvature)
        return math.sqrt(variance * float(gradient @ self.covariance @ gradient))

    def interval(self, variance: float, quantile: float) -> tuple[float, float]:
        """Fieller's interval of the minimum; NaN if the variance is unknown, infinite if the
        curvature is not significant.
        """
        if not (math.isfinite(variance) and math.isfinite(quantile)):
            return math.nan, math.nan
        # (b + 2 c x)^2 <= t^2 s^2 (Vbb + 4 Vbc x + 4 Vcc x^2), a quadratic in x.
        scale = quantile**2 * variance
        v_bb, v_bc, v_cc = self.covariance[0, 0], self.covariance[0, 1], self.covariance[1, 1]
        a = 4 * (self.curvature**2 - scale * v_cc)
        b = 4 * (self.slope * self.curvature - scale * v_bc)
        c = self.slope**2 - scale * v_bb
        root = b * b - 4 * a * c
        if a <= 0 or root < 0:
            return -math.inf, math.inf
        return (-b - math.sqrt(root)) / (2 * a), (-b + math.sqrt(root)) / (2 * a)


@dataclass(frozen=True)
class Optimum:
    """The best rate at one number of tokens.

    Attributes:
        tokens: number of tokens.
        best_tried: the rate of the smallest mean loss among those tried.
        flag: why there is no optimum; empty if there is one.
        rate: parabola in the logarithm of the rate; None if flagged.
        effective: parabola in that of the effective rate; None if flagged or unknown.
        runs: the runs that were fitted.
        diverged: number of runs without a finite loss.
    """

    tokens: float
    best_tried: float
    flag: str
    rate: Parabola | None
    effective: Parabola | None
    runs: tuple[Observation, ...]
    diverged: int


def fit_parabola(
    logs: Sequence[float], losses: Sequence[float], seeds: Sequence[str]
) -> Parabola | None:
    """Fit the parabola; None if it has no minimum or the points do not determine one.

    Args:
        logs: logarithms of the rates, one per run.
        losses: final losses.
        seeds: runs of equal seed share an intercept.
    """
    x, y = np.asarray(logs, dtype=float), np.asarray(losses, dtype=float)
    names = sorted(set(seeds))
    center = float(x.mean())
    intercepts = [[float(seed == name) for name in names] for seed in seeds]
    design = np.column_stack([intercepts, x - center, (x - center) ** 2])
    # Well-scaled columns, so that the rank shows whether the points determine a parabola.
    scale = np.linalg.norm(design, axis=0)
    if not scale.all() or np.linalg.matrix_rank(design / scale, tol=1e-7) < design.shape[1]:
        return None
    solution, *_ = np.linalg.lstsq(design, y, rcond=None)
    residuals = y - design @ solution
    inverse = np.linalg.inv(design.T @ design)[-2:, -2:]
    slope, curvature = float(solution[-2]), float(solution[-1])
    if curvature <= 0:
        return None
    # From x - center to x.
    shift = np.array([[1.0, -2 * center], [0.0, 1.0]])
    height = float(np.mean(solution[:-2])) - slope**2 / (4 * curvature)
    return Parabola(
        slope=slope - 2 * curvature * center,
        curvature=curvature,
        height=height,
        covariance=shift @ inverse @ shift.T,
        squares=float(residuals @ residuals),
        freedom=len(x) - design.shape[1],
        ends=(float(x.min()), float(x.max())),
    )


def optimum_at(tokens: float, runs: Sequence[Observation], window: float) -> Optimum:
    """Find the optimum among runs of equal numbers of tokens.

    Args:
        tokens: their number of tokens.
        runs: runs of several rates and seeds.
        window: rates within this factor of the best one are fitted, and its two neighbors.
    """
    by_rate: dict[float, list[float]] = defaultdict(list)
    for run in runs:
        by_rate[run.rate].append(run.loss if math.isfinite(run.loss) else math.inf)
    means = {rate: math.fsum(losses) / len(losses) for rate, losses in by_rate.items()}
    rates = sorted(means)
    best = min(rates, key=lambda rate: means[rate])
    diverged = sum(not math.isfinite(run.loss) for run in runs)

    def flagged(reason: str) -> Optimum:
        return Optimum(tokens, best, reason, None, None, (), diverged)

    if not math.isfinite(means[best]):
        return flagged("every rate diverged")
    finite = [rate for rate in rates if math.isfinite(means[rate])]
    if len(finite) < _LEAST_RATES:
        plural = "s" if len(finite) > 1 else ""
        return flagged(f"{len(finite)} rate{plural} with a finite loss, needs {_LEAST_RATES}")
    at = finite.index(best)
    if at in (0, len(finite) - 1):
        end = "smallest" if at == 0 else "largest"
        beyond = " that did not diverge" if at and best < rates[-1] else ""
        return flagged(f"not bracketed: best at the {end} rate{beyond}")
    near = set(finite[at - 1 : at + 2])
    near |= {
        rate for rate in finite if best / window <= rate * 1.001 and rate <= best * window * 1.001
    }
    fitted = tuple(run for run in runs if run.rate in near)
    losses, seeds = [run.loss for run in fitted], [run.seed for run in fitted]
    parabola = fit_parabola([math.log(run.rate) for run in fitted], losses, seeds)
    if parabola is None or not parabola.ends[0] <= parabola.minimum <= parabola.ends[1]:
        return flagged("the parabola has no minimum between the rates tried")
    effective = None
    known = [run.effective for run in fitted if run.effective is not None]
    if len(known) == len(fitted):
        effective = fit_parabola([math.log(value) for value in known], losses, seeds)
    return Optimum(tokens, best, "", parabola, effective, fitted, diverged)
