"""The report of a grid: a text table, CSV files and two figures."""

import csv
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from megatron_llr.output import replaced_file
from megatron_llr.telemetry.tables import text_table
from megatron_llr.tools.compare import figures
from megatron_llr.tools.compare.aggregate import (
    PolicyRow,
    at_the_edge,
    cells_of,
    effect_rows,
    rows_of,
)
from megatron_llr.tools.compare.checks import flagged
from megatron_llr.tools.compare.grid import Grid
from megatron_llr.tools.compare.results import Result, read_result
from megatron_llr.tools.compare.statistics import Difference, Mean


def _mean(mean: Mean) -> str:
    if not math.isfinite(mean.value):
        return "diverged"
    return f"{mean.value:.4f}" + (f" ± {mean.error:.4f}" if math.isfinite(mean.error) else "")


def _difference(of: Difference | None) -> str:
    if of is None or not math.isfinite(of.value):
        return "-"
    interval = f" [{of.low:+.4f}, {of.high:+.4f}]" if math.isfinite(of.low) else ""
    return f"{of.value:+.4f}{interval}"


def _table(grid: Grid, rows: Sequence[PolicyRow]) -> str:
    header = [*"policy,best lr,final loss,best loss,to control [95 %]".split(",")]
    header += ["M tokens to its loss", "speedup", "notes"]
    lines = []
    for row in rows:
        reached = "not reached" if row.tokens is None else f"{row.tokens / 1e6:.4g}"
        speedup = "-" if row.speedup is None else f"{row.speedup:.2f}x"
        lines.append(
            (
                row.cell.policy + (" (control)" if row.cell.policy == grid.control else ""),
                f"{row.cell.learning_rate:g}",
                _mean(row.cell.final),
                _mean(row.cell.best),
                _difference(row.difference),
                reached,
                speedup,
                "; ".join(row.notes),
            )
        )
    return text_table(header, lines)


def _write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    with (
        replaced_file(path) as partial,
        partial.open("w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)


def _run_row(result: Result) -> Sequence[object]:
    run = result.run
    losses = (result.final, result.best, result.diverged, result.first_loss, result.seconds)
    return (run.policy, run.learning_rate, run.seed, *losses)


def _table_row(row: PolicyRow) -> Sequence[object]:
    cell, of = row.cell, row.difference
    interval = (of.value, of.low, of.high, of.paired) if of else ("",) * 4
    losses = (cell.final.value, cell.final.error, cell.best.value, cell.best.error)
    head = (cell.policy, cell.learning_rate, *losses, cell.final.count)
    return (*head, *interval, row.tokens, row.speedup, "; ".join(row.notes))


def _write_data(grid: Grid, results: Sequence[Result], rows: Sequence[PolicyRow]) -> None:
    _write_csv(
        grid.out / "runs.csv",
        "policy learning_rate seed final_loss best_loss diverged first_loss seconds".split(),
        map(_run_row, results),
    )
    _write_csv(
        grid.out / "curves.csv",
        "policy learning_rate seed iteration tokens validation_loss".split(),
        (
            (*_run_row(result)[:3], iteration, iteration * grid.tokens_per_iteration, loss)
            for result in results
            for iteration, loss in result.curve
        ),
    )
    _write_csv(
        grid.out / "table.csv",
        "policy best_learning_rate final_mean final_error best_mean best_error seeds difference "
        "difference_low difference_high paired tokens_to_control speedup notes".split(),
        map(_table_row, rows),
    )


def report(grid: Grid) -> str:
    """Write table.txt, the CSV files and the figures into the grid's folder.

    Returns:
        The contents of table.txt.
    """
    runs = grid.runs()
    results = [result for run in runs if (result := read_result(run)) is not None]
    rows = rows_of(grid, results)
    cells = cells_of(grid, results)
    parts = [f"{len(results)} of {len(runs)} runs done; loss: validation, mean ± standard error"]
    if rows:
        parts.append(_table(grid, rows))
    if edge := at_the_edge(cells, rows):
        parts.append(f"best at the smallest or largest rate tried: {', '.join(edge)}")
    effects = effect_rows(grid, results)
    if effects:
        lines = [(e.meaning, f"{e.policy} - {e.against}", _difference(d)) for e, d in effects]
        parts.append(text_table(("effect", "difference of final losses", "[95 %]"), lines))
    warnings = flagged(grid, results)
    if warnings:
        parts.append("\n".join(["FLAGGED:", *(f"- {line}" for line in warnings)]))
    grid.out.mkdir(parents=True, exist_ok=True)
    _write_data(grid, results, rows)
    if rows:
        figures.curves(grid, [row.cell for row in rows], grid.out / "curves.png")
        figures.losses_over_rates(grid, cells, grid.out / "learning_rates.png")
    text = "\n\n".join(parts)
    with replaced_file(grid.out / "table.txt") as partial:
        partial.write_text(text + "\n", encoding="utf-8")
    return text
