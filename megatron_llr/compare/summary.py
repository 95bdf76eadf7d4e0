"""From results to one row per policy, each at its own best learning rate."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_llr.compare.counterparts import Effect, effects
from megatron_llr.compare.grid import Grid
from megatron_llr.compare.results import Result
from megatron_llr.compare.statistics import (
    Curve,
    Difference,
    Mean,
    difference_of,
    mean_curve,
    mean_of,
    reaches,
)


@dataclass(frozen=True)
class Cell:
    """All seeds of one policy at one learning rate."""

    policy: str
    learning_rate: float
    results: tuple[Result, ...]
    planned: int

    @property
    def diverged(self) -> int:
        """How many of the runs diverged."""
        return sum(result.diverged for result in self.results)

    @property
    def final(self) -> Mean:
        """Final validation loss over the seeds; infinite if any run diverged."""
        return mean_of([result.final for result in self.results])

    @property
    def best(self) -> Mean:
        """Best validation loss over the seeds; infinite if any run diverged."""
        return mean_of([result.best for result in self.results])

    @property
    def by_seed(self) -> dict[int, float]:
        """Seed -> final validation loss."""
        return {result.run.seed: result.final for result in self.results}

    @property
    def curve(self) -> list[tuple[int, Mean]]:
        """Mean validation loss of the runs that did not diverge."""
        return mean_curve([result.curve for result in self.results if not result.diverged])

    @property
    def means(self) -> Curve:
        """The curve without its errors."""
        return [(iteration, mean.value) for iteration, mean in self.curve]


@dataclass(frozen=True)
class Row:
    """One policy at its best learning rate, beside the control at its own."""

    cell: Cell
    difference: Difference | None
    tokens: float | None
    speedup: float | None
    notes: tuple[str, ...]


def cells_of(grid: Grid, results: Sequence[Result]) -> list[Cell]:
    """Policy by policy, rate by rate; without those that have no finished run."""
    found = []
    for policy in grid.policies:
        for rate in grid.learning_rates:
            mine = tuple(
                result
                for result in results
                if result.run.policy == policy and result.run.learning_rate == rate
            )
            if mine:
                found.append(Cell(policy, rate, mine, len(grid.seeds)))
    return found


def best_cell(cells: Sequence[Cell], policy: str) -> Cell | None:
    """The learning rate with the smallest mean final loss, among those with most seeds done."""
    mine = [cell for cell in cells if cell.policy == policy]
    most = max((len(cell.results) for cell in mine), default=0)
    whole = [cell for cell in mine if len(cell.results) == most]
    return min(whole, key=lambda cell: cell.final.value, default=None)


def _difference(ours: Cell, theirs: Cell) -> Difference | None:
    if ours.diverged or theirs.diverged:
        return None
    return difference_of(ours.by_seed, theirs.by_seed)


def _notes(cell: Cell, cells: Sequence[Cell]) -> list[str]:
    notes = [
        f"diverged at {other.learning_rate:g}: {other.diverged} of {len(other.results)}"
        for other in cells
        if other.policy == cell.policy and other.diverged
    ]
    if len(cell.results) < cell.planned:
        notes.append(f"{len(cell.results)} of {cell.planned} seeds")
    return notes


def at_the_edge(cells: Sequence[Cell], rows: Sequence[Row]) -> list[str]:
    """Policies whose best rate is the smallest or largest tried: a better one may lie beyond."""
    found = []
    for row in rows:
        policy, rate = row.cell.policy, row.cell.learning_rate
        tried = sorted(cell.learning_rate for cell in cells if cell.policy == policy)
        if len(tried) > 1 and rate in (tried[0], tried[-1]):
            found.append(policy)
    return found


def rows_of(grid: Grid, results: Sequence[Result]) -> list[Row]:
    """The table: every policy with a finished run, the control first."""
    cells = cells_of(grid, results)
    control = best_cell(cells, grid.control)
    goal = control.means[-1][1] if control is not None and control.means else math.nan
    reference = reaches(control.means, goal) if control is not None else None
    rows = []
    for policy in sorted(grid.policies, key=lambda name: name != grid.control):
        cell = best_cell(cells, policy)
        if cell is None:
            continue
        iteration = reaches(cell.means, goal) if not cell.diverged else None
        compared = control is not None and cell is not control
        rows.append(
            Row(
                cell=cell,
                difference=_difference(cell, control) if compared and control else None,
                tokens=None if iteration is None else iteration * grid.tokens_per_iteration,
                speedup=reference / iteration if iteration and reference else None,
                notes=tuple(_notes(cell, cells)),
            )
        )
    return rows


def effect_rows(grid: Grid, results: Sequence[Result]) -> list[tuple[Effect, Difference | None]]:
    """What tells the embedding's rate, the mean and the order apart, each at its best rate."""
    cells = cells_of(grid, results)
    found = []
    for effect in effects(grid.policies, grid.flags, grid.control):
        ours, theirs = best_cell(cells, effect.policy), best_cell(cells, effect.against)
        if ours is not None and theirs is not None:
            found.append((effect, _difference(ours, theirs)))
    return found
