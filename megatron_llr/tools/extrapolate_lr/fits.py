"""Fits of the optimal rate over the number of tokens, by weighted least squares in logarithms.

With t = ln(D / D0), D0 the geometric mean of the numbers of tokens: ln rate = p0 + p1 t for the
power law, + p2 t^2 for the quadratic. Weights are the inverse squared standard errors of the optima
where these are known for all of them, else equal.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from megatron_llr.tools.extrapolate_lr.optima import CONFIDENCE


def exp(log: float) -> float:
    """The exponential; infinite where it is too large for a double."""
    return math.exp(log) if not log > 700 else math.inf


@dataclass(frozen=True)
class Estimate:
    """A number with its confidence interval, NaN where there is none."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class LinearFit:
    """A linear model of ln rate.

    Attributes:
        coefficients: [P].
        covariance: [P, P]; NaN if it is unknown.
        quantile: of Student's t, for intervals.
    """

    coefficients: Any
    covariance: Any
    quantile: float

    def estimate(self, row: Sequence[float]) -> Estimate:
        """A linear combination of the coefficients with the interval of its mean."""
        weights = np.asarray(row, dtype=float)
        value = float(weights @ self.coefficients)
        half = self.quantile * math.sqrt(max(0.0, float(weights @ self.covariance @ weights)))
        return Estimate(value, value - half, value + half)


def fit_linear(
    design: Any, values: Sequence[float], errors: Sequence[float], error_freedom: int
) -> LinearFit | None:
    """Weighted least squares; None if the points do not determine the coefficients.

    The covariance is that of the errors, multiplied by chi^2 per degree of freedom if this is above
    1, as where the model does not fit; the quantile is then that of the fit's degrees of freedom.
    As many points as coefficients leave only the errors and their degrees of freedom. Without
    errors the residuals give the covariance.

    Args:
        design: [n, P].
        values: [n].
        errors: [n] standard errors, NaN where unknown.
        error_freedom: degrees of freedom behind them.
    """
    design, target = np.asarray(design, dtype=float), np.asarray(values, dtype=float)
    count, number = design.shape
    scale = np.linalg.norm(design, axis=0)
    if count < number or not scale.all():
        return None
    if np.linalg.matrix_rank(design / scale, tol=1e-7) < number:
        return None
    known = all(math.isfinite(error) and error > 0 for error in errors)
    weights = 1 / np.asarray(errors, dtype=float) if known else np.ones(count)
    weighted = design * weights[:, None]
    coefficients, *_ = np.linalg.lstsq(weighted, target * weights, rcond=None)
    covariance = np.linalg.inv(weighted.T @ weighted)
    residuals = (target - design @ coefficients) * weights
    freedom = count - number
    spread = float(residuals @ residuals) / freedom if freedom else math.nan
    if known and not spread > 1:
        freedom, spread = error_freedom, 1.0
    quantile = float(stats.t.ppf(0.5 + CONFIDENCE / 2, freedom)) if freedom else math.nan
    return LinearFit(coefficients, covariance * spread, quantile)


@dataclass(frozen=True)
class PolynomialFit:
    """A polynomial of ln rate in ln D.

    Attributes:
        degree: 1 for the power law, 2 for the quadratic.
        fit: its coefficients, of t^0, t^1, ...
        center: ln D0.
    """

    degree: int
    fit: LinearFit
    center: float

    @property
    def exponent(self) -> Estimate:
        """The exponent at D0, d ln rate / d ln D."""
        return self.fit.estimate([0.0, 1.0, *[0.0] * (self.degree - 1)])

    @property
    def curvature(self) -> Estimate | None:
        """Half the second derivative; None for the power law."""
        return self.fit.estimate([0.0, 0.0, 1.0]) if self.degree == 2 else None

    def at(self, tokens: float) -> Estimate:
        """The logarithm of the rate at a number of tokens, with the interval of the curve."""
        t = math.log(tokens) - self.center
        return self.fit.estimate([t**power for power in range(self.degree + 1)])


def fit_curve(
    tokens: Sequence[float],
    logs: Sequence[float],
    errors: Sequence[float],
    error_freedom: int,
    degree: int,
) -> PolynomialFit | None:
    """Fit a polynomial of ln rate in ln D; None with fewer points than coefficients.

    Args:
        tokens: [n] numbers of tokens.
        logs: [n] logarithms of the optimal rates.
        errors: [n] their standard errors.
        error_freedom: degrees of freedom behind these.
        degree: of the polynomial.
    """
    center = math.fsum(map(math.log, tokens)) / len(tokens)
    t = np.log(np.asarray(tokens, dtype=float)) - center
    fit = fit_linear(np.vander(t, degree + 1, increasing=True), logs, errors, error_freedom)
    return None if fit is None else PolynomialFit(degree, fit, center)
