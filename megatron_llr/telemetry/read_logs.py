"""Reads the CSV files of a run: a row per matrix, or per block and role."""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from megatron_llr.errors import input_error, shown
from megatron_llr.matrices.ids import MatrixId
from megatron_llr.telemetry.csv_log import complete_rows, files_of
from megatron_llr.telemetry.log_rows import SPREAD
from megatron_llr.telemetry.tables import Spread, block_label, role_table

Place = tuple[str, str]
"""Block label, role."""

_WHOLE = re.compile(r"[0-9]{1,18}")
_ROLE = re.compile(r"[a-z][a-z0-9_.]{0,40}")
_BLOCK = re.compile(r"([0-9]{1,9}|mtp\.[0-9]{1,9})?")
_LONGEST_ID = 200
_LARGEST = 1e100
# More would make figures that take minutes to draw.
_MOST = {"roles": 100, "blocks": 2000}


class NoMeasurementError(ValueError):
    """The files of a run have no measurement yet."""


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
    """One row, of a matrix or of a block and role.

    Args:
        row: column -> text.
        by_role: whether it is of a block and role.
        where: file and line, for errors.

    Raises:
        ValueError: if a cell cannot be read.
    """

    def __init__(self, row: Mapping[str, str], *, by_role: bool, where: str) -> None:
        self._row, self._by_role, self._where = row, by_role, where
        self.iteration = int(self._text("iteration", _WHOLE, "an update"))
        self.count = 1
        if by_role:
            self.count = int(self._text("matrices", _WHOLE, "a number of matrices"))
            self.role = self._text("role", _ROLE, "a role")
            self.block = self._text("block", _BLOCK, "a block, such as 3 or mtp.0, or empty")
            if not self.count:
                raise self._refused("matrices", "1 or more")
        else:
            try:
                matrix = MatrixId.read(row.get("matrix", "")[:_LONGEST_ID])
            except ValueError:
                raise self._refused("matrix", "an id, such as block.3.attention.q") from None
            self.role, self.block = matrix.role, block_label(matrix)

    def _refused(self, column: str, allowed: str) -> ValueError:
        return input_error(
            f"{self._where} has {column}: {shown(self._row.get(column))}. It must be {allowed}. "
            "Correct or remove the line."
        )

    def _text(self, column: str, pattern: re.Pattern[str], allowed: str) -> str:
        text = self._row.get(column, "")
        if not pattern.fullmatch(text):
            raise self._refused(column, allowed)
        return text

    def _number(self, column: str) -> float:
        """NaN for an empty cell."""
        try:
            value = float(self._row.get(column) or "nan")
        except ValueError:
            value = math.inf
        if abs(value) > _LARGEST and self._row[column] not in ("inf", "-inf"):
            raise self._refused(column, f"a number, at most {_LARGEST:g}")
        return value

    def spread(self, column: str) -> Spread | None:
        """Of a column that may be missing or empty; None also if it is not finite."""
        names = [f"{column}_{end}" for end in SPREAD] if self._by_role else [column]
        values = [self._number(name) for name in names]
        if not all(map(math.isfinite, values)):
            return None
        return Spread(*values) if self._by_role else Spread(*values * 3)


def read_rows(path: Path) -> Iterator[dict[str, str]]:
    """Rows of a CSV file of a run, without a last one that is incomplete.

    Raises:
        ValueError: naming the line that is not a row.
    """
    for _, row in _numbered_rows(path):
        yield row


def _numbered_rows(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    for number, row in complete_rows(path):
        if row is None:
            raise input_error(
                f"{path}, line {number} is not a row of text with the columns of the header. "
                "Correct or remove the line."
            )
        yield number, row


def _cells(folder: Path, which: int) -> Iterator[_Cells]:
    """Rows of measurements (0) or learning rates (1), of both kinds of file.

    Raises:
        FileNotFoundError: if the run wrote none; `--llr-log-dir` makes it.
        ValueError: naming the line that cannot be read.
    """
    files = {by_role: files_of(folder, by_role=by_role)[which].path for by_role in (False, True)}
    if not any(path.exists() for path in files.values()):
        raise FileNotFoundError(f"{files[False]} is not there: was the run given --llr-log-dir?")
    roles: set[str] = set()
    blocks: set[str] = set()
    for by_role, path in files.items():
        if not path.exists():
            continue
        for number, row in _numbered_rows(path):
            cells = _Cells(row, by_role=by_role, where=f"{path}, line {number}")
            roles.add(cells.role)
            blocks.add(cells.block)
            if len(roles) > _MOST["roles"] or len(blocks) > _MOST["blocks"]:
                raise input_error(
                    f"{path} has too many roles or blocks by line {number}. At most "
                    f"{_MOST['roles']} roles and {_MOST['blocks']} blocks can be shown. Correct "
                    "the file."
                )
            yield cells


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
        ValueError: if a row cannot be read; NoMeasurementError if there is none yet.
    """
    last: list[_Cells] = []
    for cells in _cells(folder, 0):
        if last and cells.iteration > last[0].iteration:
            last = []
        if not last or cells.iteration == last[0].iteration:
            last.append(cells)
    if not last:
        raise NoMeasurementError(f"the measurements in {folder} have no row yet")

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
