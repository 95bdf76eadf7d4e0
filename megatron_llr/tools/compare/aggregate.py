"""Results aggregated per policy, each at its own best learning rate."""

import math
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from megatron_llr.tools.compare.counterparts import Effect, effects
from megatron_llr.tools.compare.grid import Grid
from megatron_llr.tools.compare.results import Result
from megatron_llr.tools.compare.statistics import (
    Curve,
    Difference,
    Mean,
    detectable,
    difference_of,
    mean_curve,
    mean_of,
    reaches,
    student_quantile,
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
        """The curve without standard errors."""
        return [(iteration, mean.value) for iteration, mean in self.curve]

    def on(self, seeds: Collection[int]) -> "Cell":
        """The cell restricted to some seeds."""
        return replace(self, results=tuple(r for r in self.results if r.run.seed in seeds))


@dataclass(frozen=True)
class Pair:
    """Two policies, each at its best rate, with both rates chosen on the same seeds.

    Attributes:
        ours: the policy, with all its seeds.
        theirs: the policy it is compared with, with all its seeds.
        chosen_on: seeds that the rates were chosen on; empty if the two share none.
    """

    ours: Cell
    theirs: Cell
    chosen_on: frozenset[int]

    @property
    def common(self) -> frozenset[int]:
        """Seeds that both have."""
        return frozenset(self.ours.by_seed.keys() & self.theirs.by_seed.keys())

    @property
    def difference(self) -> Difference | None:
        """Of the final losses; None if one diverged, or without a shared seed or an interval."""
        if self.ours.diverged or self.theirs.diverged:
            return None
        difference = difference_of(self.ours.by_seed, self.theirs.by_seed)
        return difference if difference.paired or math.isfinite(difference.low) else None


@dataclass(frozen=True)
class PolicySummary:
    """One policy at its best learning rate, compared with the control at its own best."""

    cell: Cell
    difference: Difference | None
    tokens: float | None
    speedup: float | None
    notes: tuple[str, ...]


def cells_of(grid: Grid, results: Sequence[Result]) -> list[Cell]:
    """One cell per policy and rate that have a finished run, in the order of the grid.

    Args:
        grid: the grid.
        results: of one training length.
    """
    by_cell: dict[tuple[str, float], list[Result]] = defaultdict(list)
    for result in results:
        by_cell[result.run.policy, result.run.learning_rate].append(result)
    order = {policy: index for index, policy in enumerate(grid.policies)}
    return [
        Cell(policy, rate, tuple(by_cell[policy, rate]), len(grid.seeds))
        for policy, rate in sorted(by_cell, key=lambda key: (order[key[0]], key[1]))
    ]


def _shared_seeds(ours: Sequence[Cell], theirs: Sequence[Cell]) -> frozenset[int]:
    """Seeds to choose rates on.

    These are the seeds shared by all cells that have the most common seed.
    """
    seeds_of_cells = [frozenset(cell.by_seed) for cell in (*ours, *theirs)]
    of_policies = [{seed for cell in cells for seed in cell.by_seed} for cells in (ours, theirs)]
    shared = sorted(set.intersection(*of_policies))
    if not shared:
        return frozenset()
    most_common = max(shared, key=lambda seed: sum(seed in seeds for seeds in seeds_of_cells))
    return frozenset.intersection(*(seeds for seeds in seeds_of_cells if most_common in seeds))


def _best(cells: Sequence[Cell], seeds: frozenset[int]) -> Cell:
    """The rate with the smallest mean final loss on `seeds`, among the cells that have them all."""
    complete = [cell for cell in cells if seeds <= cell.by_seed.keys()]
    return min(complete, key=lambda cell: (cell.diverged > 0, cell.on(seeds).final.value))


def pair_of(cells: Sequence[Cell], policy: str, against: str) -> Pair | None:
    """Two policies at their best rates; None if one has no finished run.

    Rates are chosen on shared seeds, because a loss depends on the seed as much as on the policy:
    in an unfinished grid, means over different seeds cannot be compared.
    """
    ours = [cell for cell in cells if cell.policy == policy]
    theirs = [cell for cell in cells if cell.policy == against]
    if not ours or not theirs:
        return None
    seeds = _shared_seeds(ours, theirs)
    own = (_shared_seeds(cells, cells) for cells in (ours, theirs))
    first, second = (seeds, seeds) if seeds else own
    return Pair(_best(ours, first), _best(theirs, second), seeds)


def _left_out(grid: Grid, cells: Sequence[Cell], policy: str, seeds: frozenset[int]) -> list[str]:
    """Rates excluded from the choice of a policy's best, with the number of seeds they have."""
    seeds_at = {cell.learning_rate: cell.by_seed.keys() for cell in cells if cell.policy == policy}
    return [
        f"{rate:g} ({len(seeds_at.get(rate, ()))} of {len(grid.seeds)})"
        for rate in sorted({*grid.learning_rates, *seeds_at})
        if rate not in seeds_at or not seeds <= seeds_at[rate]
    ]


def _seeds_text(seeds: Collection[int]) -> str:
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, sorted(seeds)))}"


def _notes(grid: Grid, cells: Sequence[Cell], pair: Pair, control: Pair | None) -> list[str]:
    """Notes on which runs a row uses; `control` is the control paired with itself."""
    cell, other = pair.ours, pair.theirs
    notes = [
        f"diverged at {each.learning_rate:g}: {each.diverged} of {len(each.results)}"
        for each in cells
        if each.policy == cell.policy and each.diverged
    ]
    if len(cell.results) < cell.planned:
        notes.append(f"{len(cell.results)} of {cell.planned} seeds")
    if left := _left_out(grid, cells, cell.policy, pair.chosen_on):
        notes.append(f"rates excluded for missing seeds: {', '.join(left)}")
    if control is None or other.policy == cell.policy:
        return notes
    left = _left_out(grid, cells, other.policy, pair.chosen_on)
    if left and left != _left_out(grid, cells, other.policy, control.chosen_on):
        notes.append(f"rates of the control excluded: {', '.join(left)}")
    if not pair.common:
        return [*notes, "no seed shared with the control"]
    if pair.common < cell.by_seed.keys() | other.by_seed.keys():
        notes.append(f"compared only on {_seeds_text(pair.common)}")
    if pair.chosen_on < pair.common:
        notes.append(f"rates chosen only on {_seeds_text(pair.chosen_on)}")
    if other.learning_rate != control.ours.learning_rate:
        notes.append(f"compared with the control at {other.learning_rate:g}")
    return notes


def not_bracketed(cells: Sequence[Cell], summaries: Sequence[PolicySummary]) -> list[str]:
    """Policies whose best rate is the smallest or largest tried: a better one may lie outside."""
    lines = []
    for summary in summaries:
        policy, rate = summary.cell.policy, summary.cell.learning_rate
        tried = sorted(cell.learning_rate for cell in cells if cell.policy == policy)
        if len(tried) > 1 and rate in (tried[0], tried[-1]):
            lines.append(f"{policy} ({'smallest' if rate == tried[0] else 'largest'}, {rate:g})")
    return lines


def summaries_of(grid: Grid, results: Sequence[Result]) -> list[PolicySummary]:
    """The table: every policy with a finished run, the control first.

    Losses are means over all seeds of a policy. Comparisons with the control use shared seeds.
    """
    cells = cells_of(grid, results)
    control = pair_of(cells, grid.control, grid.control)
    summaries = []
    for policy in sorted(grid.policies, key=lambda name: name != grid.control):
        pair = pair_of(cells, policy, grid.control if control else policy)
        if pair is None:
            continue
        cell, means = pair.ours, pair.ours.on(pair.common).means
        reference = pair.theirs.on(pair.common).means if control else []
        goal = reference[-1][1] if reference else math.nan
        start = reaches(reference, goal)
        iteration = reaches(means, goal) if not cell.diverged else None
        summaries.append(
            PolicySummary(
                cell=cell,
                difference=pair.difference if policy != pair.theirs.policy else None,
                tokens=None if iteration is None else iteration * grid.tokens_per_iteration,
                speedup=start / iteration if iteration and start else None,
                notes=tuple(_notes(grid, cells, pair, control)),
            )
        )
    return summaries


@dataclass(frozen=True)
class Resolution:
    """What differences to the control a grid can detect.

    Attributes:
        seeds: the smallest number of seeds of a comparison.
        deviation: standard deviation of the paired differences, pooled over the policies.
        smallest: smallest true difference that is detected at 5 % with a power of 80 %.
    """

    seeds: int
    deviation: float
    smallest: float


def resolution_of(summaries: Sequence[PolicySummary]) -> Resolution | None:
    """The resolution of the comparisons with the control; None without paired intervals."""
    paired = [
        summary.difference
        for summary in summaries
        if summary.difference and summary.difference.paired and summary.difference.count > 1
    ]
    if not paired:
        return None
    variances = [
        ((each.high - each.low) / 2 / student_quantile(0.975, each.count - 1)) ** 2 * each.count
        for each in paired
    ]
    seeds = min(each.count for each in paired)
    deviation = math.sqrt(math.fsum(variances) / len(variances))
    return Resolution(seeds, deviation, detectable(deviation, seeds))


def effect_differences(
    grid: Grid, results: Sequence[Result]
) -> list[tuple[Effect, Difference | None]]:
    """The effects of the embedding's rate, the mean and the order, each policy at its best rate."""
    cells = cells_of(grid, results)
    return [
        (effect, pair.difference)
        for effect in effects(grid.policies, grid.flags, grid.control)
        if (pair := pair_of(cells, effect.policy, effect.against)) is not None
    ]
