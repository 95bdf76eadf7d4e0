"""What the rows of the CSV files say: one per matrix, or one per block and role."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from megatron_llr.config import ESTIMATORS
from megatron_llr.matrices.ids import MatrixId
from megatron_llr.matrices.info import MatrixIndex
from megatron_llr.spectrum.record import SpectrumTable
from megatron_llr.telemetry.tables import Spread, block_label, by_block_and_role, spread_of

_EXPONENTS = tuple(f"alpha_{estimator}" for estimator in ESTIMATORS)
MEASUREMENT_FIELDS = (
    "iteration",
    "matrix",
    "block",
    "role",
    "expert",
    "rows",
    "cols",
    *_EXPONENTS,
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
    "update_cosine",
)
_GROUP = ("iteration", "block", "role", "matrices")
SPREAD = ("mean", "min", "max")


def _spread_fields(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(f"{name}_{of}" for name in names for of in SPREAD)


ROLE_MEASUREMENT_FIELDS = (*_GROUP, *_spread_fields((*_EXPONENTS, "target_multiplier")))
ROLE_RATE_FIELDS = (*_GROUP, *_spread_fields(RATE_FIELDS[2:]))

Row = dict[str, Any]
Rates = tuple[MatrixId, float, float, float, float | None, float | None]
"""Matrix id, multiplier, learning rate, effective rate, relative update (None: not recorded), and
cosine between weights and update direction (None: no hyperball step)."""


def measurement_rows(
    iteration: int,
    table: SpectrumTable,
    targets: Mapping[MatrixId, float],
    matrix_index: MatrixIndex,
) -> Iterator[Row]:
    """One row per logical matrix; spectral columns are empty where it was not measured, those of
    exponents that `--llr-estimator` did not ask for throughout.
    """
    for matrix, info in matrix_index.items():
        row: Row = {
            "iteration": iteration,
            "matrix": matrix,
            "block": matrix.block,
            "role": matrix.role,
            "expert": matrix.expert,
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
        yield row


def rate_rows(iteration: int, rates: Iterable[Rates]) -> Iterator[Row]:
    """One row per logical matrix."""
    for values in rates:
        yield dict(zip(RATE_FIELDS, (iteration, *values), strict=True))


def role_measurement_rows(
    iteration: int,
    table: SpectrumTable,
    targets: Mapping[MatrixId, float],
    matrix_index: MatrixIndex,
) -> Iterator[Row]:
    """One row per block and role; an exponent's columns are empty where none was measured."""
    for matrices in by_block_and_role(matrix_index).values():
        row = _group(iteration, matrices)
        for name in _EXPONENTS:
            exponents = (getattr(table[m], name) for m in matrices if m in table)
            row.update(_columns(name, spread_of(exponents)))
        row.update(_columns("target_multiplier", spread_of(targets[m] for m in matrices)))
        yield row


def role_rate_rows(iteration: int, rates: Iterable[Rates]) -> Iterator[Row]:
    """One row per block and role; columns of what was not recorded are empty."""
    by_matrix = {matrix: values for matrix, *values in rates}
    for matrices in by_block_and_role(by_matrix).values():
        row = _group(iteration, matrices)
        for index, name in enumerate(RATE_FIELDS[2:]):
            row.update(_columns(name, spread_of(by_matrix[matrix][index] for matrix in matrices)))
        yield row


def _group(iteration: int, matrices: list[MatrixId]) -> Row:
    first = matrices[0]
    values = (iteration, block_label(first), first.role, len(matrices))
    return dict(zip(_GROUP, values, strict=True))


def _columns(name: str, spread: Spread | None) -> Row:
    if spread is None:
        return {}
    values = (spread.mean, spread.low, spread.high)
    return dict(zip(_spread_fields((name,)), values, strict=True))
