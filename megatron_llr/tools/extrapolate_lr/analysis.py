"""Optima, fits, held-out errors and predictions of a series."""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from scipy import stats

from megatron_llr.errors import input_error
from megatron_llr.tools.extrapolate_lr.fits import (
    Estimate,
    LinearFit,
    PolynomialFit,
    exp,
    fit_curve,
    fit_linear,
)
from megatron_llr.tools.extrapolate_lr.observations import Observation, Series
from megatron_llr.tools.extrapolate_lr.optima import CONFIDENCE, Optimum, Parabola, optimum_at

Variable = Literal["rate", "effective rate"]
VARIABLES: tuple[Variable, ...] = ("rate", "effective rate")


@dataclass(frozen=True)
class Point:
    """An optimum in one variable.

    Attributes:
        tokens: number of tokens.
        parabola: in the logarithm of the variable.
        error: standard error of that logarithm, NaN if unknown.
        estimate: the optimal value of the variable with its interval.
    """

    tokens: float
    parabola: Parabola
    error: float
    estimate: Estimate


@dataclass(frozen=True)
class HeldOut:
    """The prediction for the largest number of tokens from the smaller ones.

    Attributes:
        ratio: predicted over observed optimum.
        rate_ratio: the same after conversion to a rate; None if there is no conversion.
        excess_loss: loss at the prediction minus loss at the optimum, from the parabola there.
    """

    ratio: float
    rate_ratio: float | None
    excess_loss: float


@dataclass(frozen=True)
class FittedCurve:
    """A fit over the number of tokens.

    Attributes:
        variable: what was fitted.
        curve: the fit.
        held_out: None with too few numbers of tokens.
        prediction: of the variable at the number of tokens that was asked for.
        as_rate: the prediction as a learning rate; None if there is no conversion.
    """

    variable: Variable
    curve: PolynomialFit
    held_out: HeldOut | None
    prediction: Estimate | None
    as_rate: Estimate | None

    @property
    def name(self) -> str:
        """Name of the model."""
        return "power law" if self.curve.degree == 1 else "quadratic"


@dataclass(frozen=True)
class Extrapolation:
    """Everything about one series.

    Attributes:
        series: its runs.
        optima: one per number of tokens, ascending.
        points: variable -> optima that are not flagged.
        fitted: the fits; empty with fewer than two usable optima.
    """

    series: Series
    optima: tuple[Optimum, ...]
    points: dict[Variable, tuple[Point, ...]]
    fitted: tuple[FittedCurve, ...]


def series_optima(series: Series, window: float) -> list[Optimum]:
    """The optimum at every number of tokens of a series."""
    by_tokens: dict[float, list[Observation]] = defaultdict(list)
    for run in series.runs:
        by_tokens[run.tokens].append(run)
    return [optimum_at(tokens, by_tokens[tokens], window) for tokens in sorted(by_tokens)]


def best_batches(every: Sequence[Series]) -> list[Series]:
    """Join series that differ in their batch size: per number of tokens and rate the least loss.

    Rates that agree to two digits count as one.
    """
    joined: dict[tuple[str, float | None], list[Observation]] = defaultdict(list)
    for series in every:
        joined[series.policy, series.params] += series.runs
    result = []
    for (policy, params), runs in joined.items():
        best: dict[tuple[float, str, str], Observation] = {}
        for run in sorted(runs, key=lambda run: (not math.isfinite(run.loss), run.loss)):
            best.setdefault((run.tokens, f"{run.rate:.2g}", run.seed), run)
        chosen = sorted(best.values(), key=lambda run: (run.tokens, run.rate))
        result.append(Series(policy, params, None, tuple(chosen)))
    return result


def extrapolate(series: Series, window: float, target: float | None) -> Extrapolation:
    """Find the optimum at every number of tokens and fit the optima.

    Args:
        series: the runs.
        window: rates within this factor of the best one are fitted.
        target: number of tokens to predict at.
    """
    optima = series_optima(series, window)
    points: dict[Variable, tuple[Point, ...]] = {}
    freedoms: dict[Variable, int] = {}
    for variable in VARIABLES:
        parabolas = {
            optimum.tokens: parabola
            for optimum in optima
            if (parabola := optimum.rate if variable == "rate" else optimum.effective) is not None
        }
        freedom = sum(parabola.freedom for parabola in parabolas.values())
        squares = math.fsum(parabola.squares for parabola in parabolas.values())
        variance = squares / freedom if freedom else math.nan
        quantile = float(stats.t.ppf(0.5 + CONFIDENCE / 2, freedom)) if freedom else math.nan
        freedoms[variable] = freedom
        points[variable] = tuple(
            Point(
                tokens,
                parabola,
                parabola.error(variance),
                _rate_of(Estimate(parabola.minimum, *parabola.interval(variance, quantile))),
            )
            for tokens, parabola in parabolas.items()
        )
    runs = [run for optimum in optima for run in optimum.runs]
    fitted = [
        made
        for variable in VARIABLES
        for degree in (1, 2)
        if (made := _fitted(variable, points[variable], freedoms[variable], degree, runs, target))
    ]
    return Extrapolation(series, tuple(optima), points, tuple(fitted))


def _rate_of(log: Estimate) -> Estimate:
    return Estimate(*map(exp, (log.value, log.low, log.high)))


def _curve_through(points: Sequence[Point], freedom: int, degree: int) -> PolynomialFit | None:
    logs = [point.parabola.minimum for point in points]
    errors = [point.error for point in points]
    return fit_curve([point.tokens for point in points], logs, errors, freedom, degree)


def _conversion(
    variable: Variable, runs: Sequence[Observation]
) -> Callable[[float, float], float] | None:
    """(ln of the variable, tokens) -> ln of the rate.

    For the effective rate ln rate is fitted to a linear function of ln effective rate and ln D over
    all runs near the optima: the dependence of the weights' norms on both.
    """
    if variable == "rate":
        return lambda log, tokens: log
    known = [(run, run.effective) for run in runs if run.effective is not None]
    if not known:
        return None
    fit = fit_linear(
        [(1.0, math.log(effective), math.log(run.tokens)) for run, effective in known],
        [math.log(run.rate) for run, _ in known],
        [math.nan] * len(known),
        0,
    )
    if fit is None:
        return None
    made: LinearFit = fit
    return lambda log, tokens: made.estimate((1.0, log, math.log(tokens))).value


def _fitted(
    variable: Variable,
    points: Sequence[Point],
    freedom: int,
    degree: int,
    runs: Sequence[Observation],
    target: float | None,
) -> FittedCurve | None:
    """A fit with its held-out error and prediction; None with too few points."""
    if len(points) < 2 or (curve := _curve_through(points, freedom, degree)) is None:
        return None
    held_out, (*smaller, largest) = None, points
    if (partial := _curve_through(smaller, freedom, degree) if smaller else None) is not None:
        predicted, observed = partial.at(largest.tokens).value, largest.parabola.minimum
        convert = _conversion(variable, [run for run in runs if run.tokens < largest.tokens])
        rate_ratio = None
        if convert is not None and (whole := _conversion(variable, runs)) is not None:
            rate_ratio = exp(convert(predicted, largest.tokens) - whole(observed, largest.tokens))
        held_out = HeldOut(
            exp(predicted - observed),
            rate_ratio,
            largest.parabola.curvature * (predicted - observed) ** 2,
        )
    prediction = as_rate = None
    if target is not None:
        log = curve.at(target)
        prediction, convert = _rate_of(log), _conversion(variable, runs)
        if convert is not None:
            ends = (convert(value, target) for value in (log.value, log.low, log.high))
            as_rate = _rate_of(Estimate(*ends))
    return FittedCurve(variable, curve, held_out, prediction, as_rate)


def joint_exponents(results: Sequence[Extrapolation]) -> dict[str, dict[str, Estimate]]:
    """Exponents of a power law in tokens, parameters and batch size, over all series of a policy.

    Returns:
        Policy -> name of the quantity -> exponent with its interval, for policies whose series
        differ in parameters or batch size. Quantities that do not vary are left out.
    """
    by_policy: dict[str, list[Extrapolation]] = defaultdict(list)
    for result in results:
        by_policy[result.series.policy].append(result)
    joint = {}
    for policy, members in by_policy.items():
        rows = [
            ({"tokens": p.tokens, "params": m.series.params, "batch": m.series.batch}, p)
            for m in members
            for p in m.points["rate"]
        ]
        names = [
            name
            for name in ("tokens", "params", "batch")
            if None not in (values := {row[name] for row, _ in rows}) and len(values) > 1
        ]
        if not set(names) - {"tokens"}:
            continue
        fit = fit_linear(
            [[1.0, *(math.log(row[name] or math.nan) for name in names)] for row, _ in rows],
            [point.parabola.minimum for _, point in rows],
            [math.nan] * len(rows),
            0,
        )
        if fit is not None:
            units = [[float(i == j) for j in range(len(names) + 1)] for i in range(len(names) + 1)]
            joint[policy] = {
                name: fit.estimate(unit) for name, unit in zip(names, units[1:], strict=True)
            }
    return joint


def require_fits(results: Sequence[Extrapolation]) -> None:
    """Refuse an input that allows no fit at all.

    Raises:
        ValueError: with the reason for every series.
    """
    if any(result.fitted for result in results):
        return
    reasons = []
    for result in results:
        flags = [f"{o.tokens:g}: {o.flag}" for o in result.optima if o.flag]
        usable = len(result.points["rate"])
        reasons.append(
            f"{result.series} has {len(result.optima)} numbers of tokens, {usable} with an optimum"
            + (f" ({'; '.join(flags)})" if flags else "")
        )
    raise input_error(
        f"No fit is possible: {'; '.join(reasons)}. At least two numbers of tokens must have an "
        "optimum between at least three rates. Add numbers of tokens, or rates beyond the best "
        "one (extend: true in the grid)."
    )
