"""Finished runs from folders of `tools/compare.py` and from CSV files."""

import csv
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_llr.errors import input_error, shown
from megatron_llr.output import and_more

# Columns of runs.csv, which tools/compare.py writes.
_OF_A_GRID = {
    "lr": "learning_rate",
    "loss": "final_loss",
    "effective_lr": "effective_learning_rate",
}
_NEEDED = ("lr", "tokens", "loss")
COLUMNS = (*_NEEDED, "policy", "params", "batch", "effective_lr", "seed")
# Squares of their logarithms and of the losses are far from the limits of doubles.
_LARGEST = 1e30


@dataclass(frozen=True)
class Observation:
    """One finished run.

    Attributes:
        rate: peak learning rate.
        tokens: training tokens.
        loss: final validation loss; NaN or infinite if the run diverged.
        effective: effective learning rate; None if unknown.
        seed: text that identifies runs of equal data order and initial weights; may be empty.
    """

    rate: float
    tokens: float
    loss: float
    effective: float | None
    seed: str


@dataclass(frozen=True)
class Series:
    """Runs that differ only in rate, tokens and seed.

    Attributes:
        policy: policy or optimizer; may be empty.
        params: number of parameters; None if it was not given.
        batch: batch size, in the unit of the input; None if it was not given.
        runs: the runs.
    """

    policy: str
    params: float | None
    batch: float | None
    runs: tuple[Observation, ...]

    def __str__(self) -> str:
        parts = [self.policy] if self.policy else []
        parts += [f"{self.params:g} params"] if self.params is not None else []
        parts += [f"batch {self.batch:g}"] if self.batch is not None else []
        return ", ".join(parts) or "all runs"


def _cell_number(row: Mapping[str, str], column: str, place: str, *, finite: bool = True) -> float:
    text = (row.get(column) or "").strip()
    try:
        value = float(text)
        if finite:
            usable = 1 / _LARGEST <= value <= _LARGEST
        else:
            usable = abs(value) <= _LARGEST or not math.isfinite(value)
    except ValueError:
        usable = False
    if not usable:
        allowed = (
            f"a number from {1 / _LARGEST:g} to {_LARGEST:g}"
            if finite
            else f"a number up to {_LARGEST:g}, or nan for a diverged run"
        )
        raise input_error(
            f"{place} has {column}: {shown(text)}. It must be {allowed}. Correct or remove the row."
        )
    return value


def _optional(row: Mapping[str, str], column: str, place: str) -> float | None:
    return _cell_number(row, column, place) if (row.get(column) or "").strip() else None


def _label(row: Mapping[str, str], column: str, place: str) -> str:
    text = (row.get(column) or "").strip()
    if len(text) > 100 or not text.isprintable():
        raise input_error(
            f"{place} has {column}: {shown(text)}. It must be at most 100 printable characters. "
            "Correct or remove the row."
        )
    return text


def _table(path: Path, names: Mapping[str, str]) -> tuple[Path, Mapping[str, str]]:
    """The CSV file of an input, and column -> its name there."""
    if path.is_dir():
        path, names = path / "runs.csv", {**_OF_A_GRID, **names}
        if not path.exists():
            raise input_error(
                f"{path.parent} has no runs.csv, so it is not the folder of a grid. Give the out "
                "folder of tools/compare.py after its report, or a CSV file."
            )
    return path, {column: names.get(column, column) for column in COLUMNS}


def _read(path: Path, names: Mapping[str, str]) -> dict[tuple[object, ...], list[Observation]]:
    """(policy, params, batch) -> runs of one file."""
    by_series: dict[tuple[object, ...], list[Observation]] = defaultdict(list)
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            header = reader.fieldnames or []
            absent = [names[column] for column in _NEEDED if names[column] not in header]
            if absent:
                raise input_error(
                    f"{path} has no column {', '.join(absent)}; its columns are "
                    f"{and_more(list(map(shown, header)), 20) or 'none'}. It must have "
                    f"{', '.join(_NEEDED)}. Rename columns, or map them with --columns lr=NAME."
                )
            used = [name for name in header if name in names.values()]
            if twice := sorted({name for name in used if used.count(name) > 1}):
                raise input_error(
                    f"{path} has two columns {', '.join(map(shown, twice))}. The columns that are "
                    "read must have different names. Rename one."
                )
            for row in reader:
                place = f"{path}, line {reader.line_num},"
                key = (
                    _label(row, names["policy"], place),
                    _optional(row, names["params"], place),
                    _optional(row, names["batch"], place),
                )
                by_series[key].append(
                    Observation(
                        rate=_cell_number(row, names["lr"], place),
                        tokens=_cell_number(row, names["tokens"], place),
                        loss=_cell_number(row, names["loss"], place, finite=False),
                        effective=_optional(row, names["effective_lr"], place),
                        seed=_label(row, names["seed"], place),
                    )
                )
    except (OSError, UnicodeDecodeError, csv.Error) as broken:
        raise input_error(
            f"Cannot read {path}: {type(broken).__name__}: {broken}. It must be a readable CSV "
            "file or the folder of a grid. Correct the path or the file."
        ) from broken
    return by_series


def read_series(inputs: Sequence[Path], names: Mapping[str, str]) -> list[Series]:
    """Read all inputs; runs of one policy, size and batch form a series, whatever their file.

    Args:
        inputs: folders of grids, or CSV files.
        names: one of `COLUMNS` -> its name in the files, where it differs.

    Raises:
        ValueError: if an input cannot be read or has no usable row.
    """
    merged: dict[tuple[object, ...], list[Observation]] = defaultdict(list)
    for path in inputs:
        for key, runs in _read(*_table(path, names)).items():
            merged[key] += runs
    if not merged:
        raise input_error(
            f"{', '.join(map(str, inputs))} has no run. It must have a row for each run. Give a "
            "grid with finished runs or a CSV file with rows."
        )
    made = []
    for (policy, params, batch), runs in merged.items():
        series = Series(str(policy), params, batch, tuple(runs))  # type: ignore[arg-type]
        seen: set[tuple[float, float, str]] = set()
        for run in runs:
            where = (run.rate, run.tokens, run.seed)
            if run.seed and where in seen:
                raise input_error(
                    f"{series} has two runs with lr {run.rate:g}, {run.tokens:g} tokens and seed "
                    f"{run.seed}. Each may occur once. Remove one, or give them other seeds or "
                    "policies."
                )
            seen.add(where)
        made.append(series)
    order = sorted(made, key=lambda s: (s.policy, s.params or 0, s.batch or 0))
    return [replace(s, runs=tuple(sorted(s.runs, key=lambda r: (r.tokens, r.rate)))) for s in order]
