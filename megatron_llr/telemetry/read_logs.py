"""Reads the CSV files of a run: a row per matrix, or per block and role."""

import csv
import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from megatron_llr.matrices.ids import MatrixId
from megatron_llr.telemetry.csv_log import files_of
from megatron_llr.telemetry.log_rows import SPREAD
from megatron_llr.telemetry.tables import Spread, block_label, role_table

Place = tuple[str, str]
"""Block label, role."""


class Measured(NamedTuple):
    """A measurement in a run's files.

    Attributes:
        iteration: the update that it precedes.
        counts: (block label, role) -> number of matrices.
        exponents: the same -> alpha_hill_median, where it was measured.
        multipliers: the same -> multipliers that it led to.
    """

    iteration: int
    counts: dict[Place, int]
    exponents: dict[Place, Spread]
    multipliers: dict[Place, Spread]


class _Total:
    """A spread in the making."""

    def __init__(self) -> None:
        self.count = 0
        self._sum, self._low, self._high = 0.0, math.inf, -math.inf

    def add(self, spread: Spread, count: int) -> None:
        """Take in `count` values of which a spread is known."""
        self.count += count
        self._sum += spread.mean * count
        self._low, self._high = min(self._low, spread.low), max(self._high, spread.high)

    def spread(self) -> Spread:
        """Of all values taken in."""
        return Spread(self._sum / self.count, self._low, self._high)


class _Cells:
    """One row, of a matrix or of a block and role."""

    def __init__(self, row: Mapping[str, str], *, by_role: bool) -> None:
        self._row, self._by_role = row, by_role
        self.iteration = int(row["iteration"])
        self.count = int(row["matrices"]) if by_role else 1
        if by_role:
            self.role, self.block = row["role"], row["block"]
        else:
            matrix = MatrixId.read(row["matrix"])
            self.role, self.block = matrix.role, block_label(matrix)

    def spread(self, column: str) -> Spread | None:
        """Of a column that may be missing or empty."""
        names = [f"{column}_{end}" for end in SPREAD] if self._by_role else [column]
        values = [float(self._row.get(name) or "nan") for name in names]
        if any(value != value for value in values):
            return None
        return Spread(*values) if self._by_role else Spread(*values * 3)


def read_rows(path: Path) -> Iterator[dict[str, str]]:
    """Rows of a CSV file of a run."""
    with path.open(newline="") as file:
        yield from csv.DictReader(file)


def _cells(folder: Path, which: int) -> Iterator[_Cells]:
    """Rows of measurements (0) or learning rates (1), of both kinds of file.

    Raises:
        FileNotFoundError: if the run wrote none; `--llr-log-dir` makes it.
    """
    files = {by_role: files_of(folder, by_role=by_role)[which].path for by_role in (False, True)}
    if not any(path.exists() for path in files.values()):
        raise FileNotFoundError(f"{files[False]} is not there: was the run given --llr-log-dir?")
    for by_role, path in files.items():
        if path.exists():
            for row in read_rows(path):
                yield _Cells(row, by_role=by_role)


def _spreads[Key: Hashable](
    rows: Iterable[_Cells],
    column: str,
    key: Callable[[_Cells], Key],
    above_zero: bool = False,
) -> dict[Key, Spread]:
    totals: dict[Key, _Total] = defaultdict(_Total)
    for cells in rows:
        spread = cells.spread(column)
        if spread is not None and not (above_zero and spread.low <= 0):
            totals[key(cells)].add(spread, cells.count)
    return {name: total.spread() for name, total in totals.items()}


def last_measurement(folder: Path) -> Measured:
    """A run's last measurement.

    Raises:
        FileNotFoundError: if the run wrote none; `--llr-log-dir` makes it.
        ValueError: if there was none yet.
    """
    last: list[_Cells] = []
    for cells in _cells(folder, 0):
        if last and cells.iteration > last[0].iteration:
            last = []
        if not last or cells.iteration == last[0].iteration:
            last.append(cells)
    if not last:
        raise ValueError(f"the measurements in {folder} hold no row yet")

    def place(cells: _Cells) -> Place:
        return cells.block, cells.role

    counts: dict[Place, int] = defaultdict(int)
    for cells in last:
        counts[place(cells)] += cells.count
    return Measured(
        last[0].iteration,
        dict(counts),
        _spreads(last, "alpha_hill_median", place),
        _spreads(last, "target_multiplier", place),
    )


def last_role_table(measured: Measured) -> str:
    """The table per role that a run ends with."""
    counts: dict[str, int] = defaultdict(int)
    for (_, role), count in measured.counts.items():
        counts[role] += count

    def merged(spreads: Mapping[Place, Spread]) -> dict[str, Spread]:
        totals: dict[str, _Total] = defaultdict(_Total)
        for place, spread in spreads.items():
            totals[place[1]].add(spread, measured.counts[place])
        return {role: total.spread() for role, total in totals.items()}

    return role_table(counts, merged(measured.exponents), merged(measured.multipliers))


def rates_by_role(
    folder: Path, column: str, *, above_zero: bool = False
) -> dict[str, dict[int, Spread]]:
    """Role -> update -> spread of a column of the learning rates.

    Args:
        folder: of the run.
        column: as `learning_rates.csv` names it.
        above_zero: leave out what has no place on a logarithmic axis, as a warmup from 0.

    Raises:
        FileNotFoundError: if the run wrote none; `--llr-log-dir` makes it.
    """
    rows = _cells(folder, 1)
    spreads = _spreads(rows, column, lambda cells: (cells.role, cells.iteration), above_zero)
    by_role: dict[str, dict[int, Spread]] = defaultdict(dict)
    for (role, update), spread in spreads.items():
        by_role[role][update] = spread
    return dict(by_role)
