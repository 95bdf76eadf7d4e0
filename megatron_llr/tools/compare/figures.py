"""The figures of a grid: loss curves, final loss over learning rate, sensitivity of roles."""

import math
from collections.abc import Sequence
from pathlib import Path

from megatron_llr.output import replaced_file
from megatron_llr.telemetry.plots import pyplot
from megatron_llr.tools.compare.aggregate import Cell
from megatron_llr.tools.compare.grid import Grid
from megatron_llr.tools.compare.sensitivity import RoleSensitivity


def _colours(grid: Grid) -> dict[str, int]:
    return {policy: index % 10 for index, policy in enumerate(grid.policies)}


def curves(grid: Grid, cells: Sequence[Cell], target: Path) -> None:
    """Validation loss over tokens, a line per policy at its best rate, a band of ± one error."""
    plt = pyplot()
    palette, colours = plt.get_cmap("tab10"), _colours(grid)
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for cell in cells:
        if not cell.curve:
            continue
        tokens = [iteration * grid.tokens_per_iteration for iteration, _ in cell.curve]
        values = [mean.value for _, mean in cell.curve]
        errors = [0.0 if math.isnan(mean.error) else mean.error for _, mean in cell.curve]
        colour = palette(colours[cell.policy])
        label = f"{cell.policy}, lr {cell.learning_rate:g}"
        axes.plot(tokens, values, label=label, color=colour, linewidth=1.5)
        axes.fill_between(
            tokens,
            [value - error for value, error in zip(values, errors, strict=True)],
            [value + error for value, error in zip(values, errors, strict=True)],
            color=colour,
            alpha=0.15,
            linewidth=0,
        )
    axes.set_xlabel("tokens")
    axes.set_ylabel("validation loss")
    axes.set_title("every policy at its best learning rate")
    axes.legend(fontsize=8)
    with replaced_file(target) as partial:
        figure.savefig(partial, dpi=110)
    plt.close(figure)


def losses_over_rates(grid: Grid, cells: Sequence[Cell], target: Path) -> None:
    """Final validation loss against learning rate; a cross at the top where runs diverged."""
    plt = pyplot()
    palette, colours = plt.get_cmap("tab10"), _colours(grid)
    figure, axes = plt.subplots(figsize=(7, 5), layout="constrained")
    top = max((c.final.value for c in cells if math.isfinite(c.final.value)), default=1.0)
    for policy in grid.policies:
        mine = sorted((c for c in cells if c.policy == policy), key=lambda c: c.learning_rate)
        finished = [cell for cell in mine if not cell.diverged]
        axes.errorbar(
            [cell.learning_rate for cell in finished],
            [cell.final.value for cell in finished],
            yerr=[0.0 if math.isnan(c.final.error) else c.final.error for c in finished],
            label=policy,
            color=palette(colours[policy]),
            marker="o",
            markersize=4,
            capsize=3,
            linewidth=1.3,
        )
        diverged = [cell.learning_rate for cell in mine if cell.diverged]
        axes.plot(
            diverged, [top] * len(diverged), "x", color=palette(colours[policy]), markersize=9
        )
    axes.set_xscale("log")
    axes.set_xlabel("learning rate")
    axes.set_ylabel("final validation loss")
    axes.set_title("final loss against learning rate (x: diverged)")
    axes.legend(fontsize=8)
    with replaced_file(target) as partial:
        figure.savefig(partial, dpi=110)
    plt.close(figure)


def sensitivities(roles: Sequence[RoleSensitivity], target: Path) -> None:
    """Slope of the final loss in the logarithm of each role's rate, with its interval."""
    plt = pyplot()
    known = [each for each in roles if each.slope.count]
    figure, axes = plt.subplots(figsize=(7, 1.2 + 0.35 * len(known)), layout="constrained")
    for row, each in enumerate(reversed(known)):
        slope = each.slope
        half = (slope.high - slope.low) / 2
        axes.errorbar(
            slope.value, row, xerr=half if math.isfinite(half) else 0.0, fmt="o", capsize=3
        )
    axes.axvline(0.0, color="gray", linewidth=0.8)
    axes.set_yticks(range(len(known)), [each.role for each in reversed(known)])
    axes.set_xlabel("d loss / d ln rate (negative: a larger rate is better)")
    with replaced_file(target) as partial:
        figure.savefig(partial, dpi=110)
    plt.close(figure)
