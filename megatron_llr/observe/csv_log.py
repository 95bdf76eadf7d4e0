"""measurements.csv, learning_rates.csv and the latest spectra, written by one rank."""

import csv
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from megatron_llr.records import Directory, SpectrumTable, block_of, expert_of, role_of

MEASUREMENT_FIELDS = (
    "iteration",
    "matrix",
    "block",
    "role",
    "expert",
    "rows",
    "cols",
    "alpha_hill_median",
    "alpha_hat",
    "spectral_norm",
    "frobenius_norm",
    "stable_rank",
    "entropy",
    "num_eigenvalues",
    "fit_distance",
    "method",
    "target_multiplier",
)
RATE_FIELDS = (
    "iteration",
    "matrix",
    "multiplier",
    "learning_rate",
    "effective_learning_rate",
    "relative_update",
)


def _keep(path: Path, fields: tuple[str, ...], last_iteration: int) -> None:
    """Rewrite a CSV with its header and the rows up to an iteration; a torn last row is dropped.

    Columns that an earlier version did not write stay empty in its rows.
    """
    kept: list[dict[str, str]] = []
    if path.exists():
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                whole = set(row) <= set(fields) and None not in row.values()
                number = row.get("iteration") or ""
                if whole and number.isdigit() and int(number) <= last_iteration:
                    kept.append(row)
    beside = path.with_suffix(".csv.part")
    with beside.open("w", newline="") as file:
        writer = csv.DictWriter(file, fields)
        writer.writeheader()
        writer.writerows(kept)
    os.replace(beside, path)


def _append(path: Path, fields: tuple[str, ...], rows: Iterable[Mapping[str, Any]]) -> None:
    with path.open("a", newline="") as file:
        csv.DictWriter(file, fields).writerows(rows)


class CsvLog:
    """The CSV files of one run.

    Args:
        folder: made if it does not exist.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self.measurements = self.folder / "measurements.csv"
        self.rates = self.folder / "learning_rates.csv"
        self.spectra = self.folder / "spectra.npz"

    def open(self, *, measured_up_to: int, rates_up_to: int) -> None:
        """Begin the files, or cut the rows that a resumed run will write again.

        Args:
            measured_up_to: last update whose measurement is kept.
            rates_up_to: last update whose learning rates are kept.

        Raises:
            OSError: if the folder cannot be written.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        _keep(self.measurements, MEASUREMENT_FIELDS, measured_up_to)
        _keep(self.rates, RATE_FIELDS, rates_up_to)

    def write_measurement(
        self,
        iteration: int,
        table: SpectrumTable,
        targets: Mapping[str, float],
        directory: Directory,
    ) -> None:
        """One row per logical matrix; spectral columns are empty where it was not measured."""
        rows = []
        for matrix, info in directory.items():
            row: dict[str, Any] = {
                "iteration": iteration,
                "matrix": matrix,
                "block": block_of(matrix),
                "role": role_of(matrix),
                "expert": expert_of(matrix),
                "rows": info.rows,
                "cols": info.columns,
                "num_eigenvalues": info.num_eigenvalues,
                "target_multiplier": targets[matrix],
            }
            record = table.get(matrix)
            if record is not None:
                row.update(
                    (field, getattr(record, field))
                    for field in MEASUREMENT_FIELDS
                    if hasattr(record, field)
                )
            rows.append(row)
        _append(self.measurements, MEASUREMENT_FIELDS, rows)

    def write_spectra(self, spectra: Mapping[str, Any]) -> None:
        """Singular values of the latest measurement, one array per matrix id."""
        beside = self.spectra.with_suffix(".part.npz")
        arrays: dict[str, Any] = {matrix: np.asarray(values) for matrix, values in spectra.items()}
        np.savez(beside, **arrays)
        os.replace(beside, self.spectra)

    def write_rates(
        self, iteration: int, rows: Iterable[tuple[str, float, float, float, float | None]]
    ) -> None:
        """Rows of one update: matrix, multiplier, learning rate, effective rate, relative update.

        A relative update that was not recorded is None, and its cell empty.
        """
        _append(
            self.rates,
            RATE_FIELDS,
            (dict(zip(RATE_FIELDS, (iteration, *row), strict=True)) for row in rows),
        )
