"""The report of a grid: a text table, CSV files and figures."""

import math
from collections.abc import Sequence

from megatron_llr.output import replaced_file, write_csv
from megatron_llr.telemetry.tables import text_table
from megatron_llr.tools.compare import figures
from megatron_llr.tools.compare.aggregate import (
    PolicySummary,
    cells_of,
    effect_differences,
    not_bracketed,
    resolution_of,
    summaries_of,
)
from megatron_llr.tools.compare.checks import flagged
from megatron_llr.tools.compare.effective_rate import effective_rate_of
from megatron_llr.tools.compare.grid import Grid
from megatron_llr.tools.compare.planning import planned_runs
from megatron_llr.tools.compare.results import Result, read_result
from megatron_llr.tools.compare.sensitivity import RoleSensitivity, role_sensitivities
from megatron_llr.tools.compare.statistics import Difference, Mean

_RUN_FIELDS = "policy learning_rate seed iterations tokens".split()
_TABLE_FIELDS = (
    "policy iterations tokens best_learning_rate final_mean final_error best_mean best_error "
    "seeds difference difference_low difference_high paired tokens_to_control speedup notes"
).split()


def _mean_text(mean: Mean) -> str:
    if not math.isfinite(mean.value):
        return "diverged"
    return f"{mean.value:.4f}" + (f" ± {mean.error:.4f}" if math.isfinite(mean.error) else "")


def _difference_text(of: Difference | None) -> str:
    if of is None or not math.isfinite(of.value):
        return "-"
    interval = f" [{of.low:+.4f}, {of.high:+.4f}]" if math.isfinite(of.low) else ""
    return f"{of.value:+.4f}{interval}"


def _summary_table(grid: Grid, summaries: Sequence[PolicySummary]) -> str:
    header = [*"policy,best lr,final loss,best loss,to control [95 %]".split(",")]
    header += ["M tokens to its loss", "speedup", "notes"]
    lines = []
    for summary in summaries:
        cell = summary.cell
        reached = "not reached" if summary.tokens is None else f"{summary.tokens / 1e6:.4g}"
        speedup = "-" if summary.speedup is None else f"{summary.speedup:.2f}x"
        lines.append(
            (
                cell.policy + (" (control)" if cell.policy == grid.control else ""),
                f"{cell.learning_rate:g}",
                _mean_text(cell.final),
                _mean_text(cell.best),
                _difference_text(summary.difference),
                reached,
                speedup,
                "; ".join(summary.notes),
            )
        )
    return text_table(header, lines)


def _write_runs(grid: Grid, results: Sequence[Result]) -> None:
    """runs.csv and curves.csv."""

    def first_columns(result: Result) -> tuple[object, ...]:
        run = result.run
        tokens = run.iterations * grid.tokens_per_iteration
        return (run.policy, run.learning_rate, run.seed, run.iterations, tokens)

    write_csv(
        grid.out / "runs.csv",
        [
            *_RUN_FIELDS,
            *"final_loss best_loss diverged first_loss seconds effective_learning_rate".split(),
        ],
        (
            (
                *first_columns(result),
                result.final,
                result.best,
                result.diverged,
                result.first_loss,
                result.seconds,
                effective_rate_of(result.run.folder),
            )
            for result in results
        ),
    )
    write_csv(
        grid.out / "curves.csv",
        [*_RUN_FIELDS[:4], "iteration", "tokens", "validation_loss"],
        (
            (*first_columns(result)[:4], iteration, iteration * grid.tokens_per_iteration, loss)
            for result in results
            for iteration, loss in result.curve
        ),
    )


def _section(grid: Grid, results: Sequence[Result], summaries: Sequence[PolicySummary]) -> str:
    """The tables and warnings of one training length."""
    parts = []
    if summaries:
        parts.append(_summary_table(grid, summaries))
    if edge := not_bracketed(cells_of(grid, results), summaries):
        added = f", after up to {grid.extend} added rates" if grid.extend else ""
        parts.append(f"best rate not bracketed by those tried{added}: {', '.join(edge)}")
    if effects := effect_differences(grid, results):
        lines = [(e.meaning, f"{e.policy} - {e.against}", _difference_text(d)) for e, d in effects]
        parts.append(text_table(("effect", "difference of final losses", "[95 %]"), lines))
    if resolution := resolution_of(summaries):
        parts.append(
            "smallest difference to the control that could have been detected (5 %, power 80 %): "
            f"{resolution.smallest:.4f}, with {resolution.seeds} seeds and a standard deviation of "
            f"the differences of {resolution.deviation:.4f}"
        )
    elif len(summaries) > 1:
        parts.append("no difference can be distinguished from noise: that needs two shared seeds")
    if warnings := flagged(grid, results):
        parts.append("\n".join(["FLAGGED:", *(f"- {line}" for line in warnings)]))
    return "\n\n".join(parts)


def _sensitivity_section(grid: Grid, roles: Sequence[RoleSensitivity]) -> str:
    """The table of the sweep; also writes sensitivity.csv and sensitivity.png."""
    assert grid.sensitivity is not None
    factors = grid.sensitivity.factors

    def cells(of: Difference | None) -> tuple[object, ...]:
        return ("",) * 3 if of is None else (of.value, of.low, of.high)

    write_csv(
        grid.out / "sensitivity.csv",
        [
            *("role", "seeds", "slope", "slope_low", "slope_high"),
            *(f"change_{factor:g}{end}" for factor in factors for end in ("", "_low", "_high")),
        ],
        (
            (
                *(each.role, each.slope.count, *cells(each.slope)),
                *(cell for factor in factors for cell in cells(each.changes.get(factor))),
            )
            for each in roles
        ),
    )
    figures.sensitivities(roles, grid.out / "sensitivity.png")
    header = ["role", "d loss / d ln rate [95 %]", *(f"rate x {f:g} [95 %]" for f in factors)]
    lines = [
        (
            each.role,
            _difference_text(each.slope),
            *(_difference_text(each.changes.get(f)) for f in factors),
        )
        for each in roles
    ]
    title = f"sensitivity to the rate of each role, around {grid.sensitivity.policy}:"
    return f"{title}\n\n{text_table(header, lines)}"


def write_report(grid: Grid) -> str:
    """Write table.txt, the CSV files and the figures into the grid's folder.

    Returns:
        The contents of table.txt.
    """
    runs = planned_runs(grid)
    finished = [result for run in runs if (result := read_result(run)) is not None]
    results = [result for result in finished if not result.run.role]
    parts = [f"{len(finished)} of {len(runs)} runs done; loss: validation, mean ± standard error"]
    grid.out.mkdir(parents=True, exist_ok=True)
    table: list[tuple[object, ...]] = []
    for iterations in grid.iterations:
        mine = [result for result in results if result.run.iterations == iterations]
        summaries = summaries_of(grid, mine)
        tokens, several = iterations * grid.tokens_per_iteration, len(grid.iterations) > 1
        for summary in summaries:
            cell, of = summary.cell, summary.difference
            losses = (cell.final.value, cell.final.error, cell.best.value, cell.best.error)
            interval = (of.value, of.low, of.high, of.paired) if of else ("",) * 4
            head = (cell.policy, iterations, tokens, cell.learning_rate)
            rest = (summary.tokens, summary.speedup, "; ".join(summary.notes))
            table.append((*head, *losses, cell.final.count, *interval, *rest))
        if several:
            parts.append(f"{iterations} updates, {tokens / 1e6:.4g}M tokens:")
        parts.append(_section(grid, mine, summaries))
        if summaries:
            suffix = f"-{iterations}" if several else ""
            best = [summary.cell for summary in summaries]
            figures.curves(grid, best, grid.out / f"curves{suffix}.png")
            figures.losses_over_rates(
                grid, cells_of(grid, mine), grid.out / f"learning_rates{suffix}.png"
            )
    if roles := role_sensitivities(grid, finished):
        parts.append(_sensitivity_section(grid, roles))
    _write_runs(grid, results)
    write_csv(grid.out / "table.csv", _TABLE_FIELDS, table)
    text = "\n\n".join(part for part in parts if part)
    with replaced_file(grid.out / "table.txt") as partial:
        partial.write_text(text + "\n", encoding="utf-8")
    return text
