"""The output of an extrapolation: a text table, CSV files and one figure."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_llr.output import replaced_file, write_csv
from megatron_llr.telemetry.plots import pyplot
from megatron_llr.telemetry.tables import text_table
from megatron_llr.tools.extrapolate_lr.analysis import (
    VARIABLES,
    Extrapolation,
    FittedCurve,
    joint_exponents,
)
from megatron_llr.tools.extrapolate_lr.fits import Estimate, exp

# More series have no legend, which would hide the panel.
_LEGEND = 12


def _estimate(estimate: Estimate | None, form: str) -> str:
    if estimate is None:
        return "-"
    if math.isnan(estimate.low):
        return format(estimate.value, form)
    return f"{estimate.value:{form}} [{estimate.low:{form}}, {estimate.high:{form}}]"


def _optimum_lines(result: Extrapolation) -> list[tuple[str, ...]]:
    points = {v: {p.tokens: p for p in result.points[v]} for v in VARIABLES}
    lines = []
    for optimum in result.optima:
        cells = [f"{optimum.tokens:.4g}", f"{optimum.best_tried:.4g}"]
        for variable in VARIABLES:
            point = points[variable].get(optimum.tokens)
            cells.append(_estimate(point.estimate if point else None, ".4g"))
        notes = [optimum.flag] if optimum.flag else []
        notes += [f"{optimum.diverged} diverged"] if optimum.diverged else []
        lines.append((*cells, "; ".join(notes)))
    return lines


def _fit_line(fit: FittedCurve, target: float | None) -> tuple[str, ...]:
    held = fit.held_out
    rate_ratio = held.rate_ratio if held else None
    cells = (
        f"{fit.variable}, {fit.name}",
        _estimate(fit.curve.exponent, "+.3f"),
        _estimate(fit.curve.curvature, "+.3f"),
        f"{held.ratio:.3f}" if held else "-",
        "-" if rate_ratio is None else f"{rate_ratio:.3f}",
        f"{held.excess_loss:.4f}" if held else "-",
    )
    if target is None:
        return cells
    return (*cells, _estimate(fit.prediction, ".3g"), _estimate(fit.as_rate, ".3g"))


def report_text(results: Sequence[Extrapolation], target: float | None) -> str:
    """The table of every series, and the joint power law where sizes or batches differ."""
    parts = []
    for result in results:
        parts.append(f"{result.series}: {len(result.series.runs)} runs")
        header = ("tokens", "best tried", "optimal rate [95 %]", "optimal effective rate [95 %]")
        parts.append(text_table((*header, "notes"), _optimum_lines(result)))
        if not result.fitted:
            parts.append("no fit: fewer than two numbers of tokens with an optimum")
            continue
        columns = ["fit", "exponent [95 %]", "curvature [95 %]", "held out", "as rate", "excess"]
        if target is not None:
            columns += [f"at {target:.4g} tokens [95 %]", "as rate [95 %]"]
        parts.append(text_table(columns, [_fit_line(fit, target) for fit in result.fitted]))
    for policy, exponents in joint_exponents(results).items():
        named = ", ".join(f"{name} {_estimate(e, '+.3f')}" for name, e in exponents.items())
        parts.append(f"joint power law of the rate{f', {policy}' if policy else ''}: {named}")
    parts.append(
        "held out: predicted over observed optimum at the largest number of tokens, from the "
        "smaller ones; excess: the loss that this costs"
    )
    return "\n\n".join(parts)


def _interval_cells(estimate: Estimate | None) -> tuple[object, ...]:
    return ("",) * 3 if estimate is None else (estimate.value, estimate.low, estimate.high)


def write_files(
    folder: Path, results: Sequence[Extrapolation], target: float | None, text: str
) -> None:
    """Write extrapolation.txt, optima.csv, fits.csv and extrapolation.png."""
    folder.mkdir(parents=True, exist_ok=True)

    def key(result: Extrapolation) -> tuple[object, ...]:
        return (result.series.policy, result.series.params, result.series.batch)

    write_csv(
        folder / "optima.csv",
        "policy params batch variable tokens optimum low high curvature loss".split(),
        (
            (
                *(*key(result), variable, point.tokens),
                *(
                    *_interval_cells(point.estimate),
                    point.parabola.curvature,
                    point.parabola.height,
                ),
            )
            for result in results
            for variable in VARIABLES
            for point in result.points[variable]
        ),
    )
    write_csv(
        folder / "fits.csv",
        (
            "policy params batch variable model exponent exponent_low exponent_high curvature "
            "curvature_low curvature_high held_out_ratio held_out_rate_ratio held_out_excess_loss "
            "target_tokens prediction prediction_low prediction_high rate rate_low rate_high"
        ).split(),
        (
            (
                *(*key(result), fit.variable, fit.name),
                *(*_interval_cells(fit.curve.exponent), *_interval_cells(fit.curve.curvature)),
                *((held.ratio, held.rate_ratio, held.excess_loss) if held else ("",) * 3),
                *(target, *_interval_cells(fit.prediction), *_interval_cells(fit.as_rate)),
            )
            for result in results
            for fit in result.fitted
            for held in (fit.held_out,)
        ),
    )
    _figure(folder / "extrapolation.png", results, target)
    with replaced_file(folder / "extrapolation.txt") as partial:
        partial.write_text(text + "\n", encoding="utf-8")


def _figure(path: Path, results: Sequence[Extrapolation], target: float | None) -> None:
    """Optima with their intervals and the fits, a panel per variable."""
    plt = pyplot()
    shown = [v for v in VARIABLES if any(result.points[v] for result in results)]
    figure, panels = plt.subplots(
        1, len(shown), figsize=(7 * len(shown), 5), layout="constrained", squeeze=False
    )
    palette = plt.get_cmap("tab10")
    for axes, variable in zip(panels[0], shown, strict=True):
        for index, result in enumerate(results):
            color, points = palette(index % 10), result.points[variable]
            if not points:
                continue
            tokens = [point.tokens for point in points]
            values = [point.estimate.value for point in points]
            # An unknown or unbounded interval has no bar.
            below = [v - p.estimate.low for v, p in zip(values, points, strict=True)]
            above = [p.estimate.high - v for v, p in zip(values, points, strict=True)]
            bars = [[e if 0 <= e < math.inf else 0.0 for e in side] for side in (below, above)]
            axes.errorbar(
                tokens, values, yerr=bars, fmt="o", color=color, capsize=3, label=str(result.series)
            )
            last = max(tokens[-1], target or 0)
            line = np.geomspace(tokens[0], last, 60)
            for fit in (fit for fit in result.fitted if fit.variable == variable):
                style = "-" if fit.curve.degree == 1 else "--"
                axes.plot(line, [exp(fit.curve.at(t).value) for t in line], style, color=color)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("training tokens")
        axes.set_ylabel(f"optimal {variable}")
        axes.set_title("line: power law, dashed: quadratic in ln D")
        if len(results) <= _LEGEND:
            axes.legend(fontsize=8)
    with replaced_file(path) as partial:
        figure.savefig(partial, dpi=110)
    plt.close(figure)
