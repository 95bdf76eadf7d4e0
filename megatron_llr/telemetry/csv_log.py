"""measurements.csv, learning_rates.csv and the latest spectra, written by one rank."""

import contextlib
import csv
import io
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_llr.matrices.ids import MatrixId
from megatron_llr.matrices.info import MatrixIndex
from megatron_llr.output import replaced_file
from megatron_llr.spectrum.record import SpectrumTable
from megatron_llr.telemetry import log_rows

logger = logging.getLogger(__name__)

_LONGEST_LINE = 2**16
_UPDATE = re.compile(r"[0-9]{1,18}")


def complete_rows(path: Path) -> Iterator[tuple[int, dict[str, str] | None]]:
    """Rows of a run's CSV file with their line numbers; None for a line that is not a row.

    A last line without its end is left out: a job is writing it, or was killed. Cells of these
    files have no commas, quotes or line breaks.
    """
    header: list[str] | None = None
    with path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(_LONGEST_LINE), b""), 1):
            if not line.endswith(b"\n"):
                if len(line) == _LONGEST_LINE:
                    yield number, None
                continue
            text = line.decode(errors="replace").removeprefix("\ufeff").rstrip("\r\n")
            cells = text.split(",")
            if header is None:
                header = cells
            elif text:
                valid = len(cells) == len(header) and not {"\0", "\ufffd"} & set(text)
                yield number, dict(zip(header, cells, strict=True)) if valid else None


@dataclass(frozen=True)
class _CsvFile:
    """A CSV file whose rows belong to iterations, ascending."""

    path: Path
    fields: tuple[str, ...]

    def cut(self, last_iteration: int) -> None:
        """Rewrite it with its header and the rows up to an iteration; damaged rows are dropped.

        Columns that an earlier version did not write stay empty in its rows.
        """
        with replaced_file(self.path) as partial, partial.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.fields)
            writer.writeheader()
            if self.path.exists():
                rows = (row for _, row in complete_rows(self.path) if row is not None)
                writer.writerows(row for row in rows if self._keeps(row, last_iteration))

    def _keeps(self, row: Mapping[str, str], last_iteration: int) -> bool:
        number = row.get("iteration", "")
        known = set(row) <= set(self.fields) and _UPDATE.fullmatch(number) is not None
        return known and int(number) <= last_iteration

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write rows at the end, all or none. A file that was removed or emptied begins again.

        Raises:
            OSError: if they cannot be written; the file is then as before.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            text = io.StringIO(newline="")
            writer = csv.DictWriter(text, self.fields)
            if size == 0:
                logger.warning(
                    "megatron_llr: %s was removed or emptied. It begins again, and its earlier "
                    "rows are lost",
                    self.path,
                )
                writer.writeheader()
            writer.writerows(rows)
            rest = memoryview(text.getvalue().encode())
            try:
                while rest:
                    rest = rest[file.write(rest) :]
            except OSError:
                # Half a row would be continued by the next one.
                with contextlib.suppress(OSError):
                    file.truncate(size)
                raise


class CsvLog:
    """The CSV files of one run.

    Args:
        folder: made if it does not exist.
        by_role: a row per block and role, in files of their own, and no spectra.
    """

    def __init__(self, folder: str | os.PathLike[str], *, by_role: bool = False) -> None:
        self.folder = Path(folder)
        self.by_role = by_role
        self._measurements, self._rates = files_of(self.folder, by_role=by_role)
        self._others = files_of(self.folder, by_role=not by_role)
        self._spectra = self.folder / "spectra.npz"

    def open(self, *, measured_up_to: int, rates_up_to: int) -> bool:
        """Begin the files, or cut the rows that a resumed run will write again.

        Args:
            measured_up_to: last update whose measurement is kept.
            rates_up_to: last update whose learning rates are kept.

        Returns:
            Whether the folder had none of these files.

        Raises:
            OSError: if the folder cannot be written.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        files = (self._measurements, self._rates, *self._others)
        new = not any(file.path.exists() for file in files)
        ends = (measured_up_to, rates_up_to)
        for file, end in zip((self._measurements, self._rates), ends, strict=True):
            file.cut(end)
        # Files of the other kind, from before --llr-log-matrices was changed, end here too.
        for file, end in zip(self._others, ends, strict=True):
            if file.path.exists():
                file.cut(end)
        return new

    def write_measurement(
        self,
        iteration: int,
        table: SpectrumTable,
        targets: Mapping[MatrixId, float],
        matrix_index: MatrixIndex,
    ) -> None:
        """The rows of one measurement."""
        rows = log_rows.role_measurement_rows if self.by_role else log_rows.measurement_rows
        self._measurements.append(rows(iteration, table, targets, matrix_index))

    def write_spectra(self, spectra: Mapping[MatrixId, Any]) -> None:
        """Singular values of the latest measurement, one array per matrix id."""
        arrays: dict[str, Any] = {
            str(matrix): np.asarray(values) for matrix, values in spectra.items()
        }
        with replaced_file(self._spectra) as partial:
            np.savez(partial, **arrays)

    def write_rates(self, iteration: int, rates: Iterable[log_rows.Rates]) -> None:
        """The rows of one update; a relative update that was not recorded leaves its cell empty."""
        rows = log_rows.role_rate_rows if self.by_role else log_rows.rate_rows
        self._rates.append(rows(iteration, rates))


def files_of(folder: Path, *, by_role: bool) -> tuple[_CsvFile, _CsvFile]:
    """The files of measurements and of learning rates, per matrix or per block and role."""
    if by_role:
        return (
            _CsvFile(folder / "measurements_by_role.csv", log_rows.ROLE_MEASUREMENT_FIELDS),
            _CsvFile(folder / "learning_rates_by_role.csv", log_rows.ROLE_RATE_FIELDS),
        )
    return (
        _CsvFile(folder / "measurements.csv", log_rows.MEASUREMENT_FIELDS),
        _CsvFile(folder / "learning_rates.csv", log_rows.RATE_FIELDS),
    )
