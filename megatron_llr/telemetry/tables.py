"""Per-role summaries and the lines that a person reads."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from megatron_llr.matrices.ids import MatrixId
from megatron_llr.matrices.info import MatrixIndex, MatrixInfo


@dataclass(frozen=True)
class Spread:
    """Mean, smallest and largest of a quantity over the matrices of one role."""

    mean: float
    low: float
    high: float


def spread_of(values: Iterable[float | None]) -> Spread | None:
    """Spread of the known values: None and NaN are left out; None if nothing is left."""
    known = [value for value in values if value is not None and value == value]
    return Spread(sum(known) / len(known), min(known), max(known)) if known else None


def by_role(values: Mapping[MatrixId, float]) -> dict[str, Spread]:
    """Role -> spread of a quantity, roles in the order of their first matrix; NaN is left out."""
    grouped: dict[str, list[float]] = defaultdict(list)
    for matrix, value in values.items():
        grouped[matrix.role].append(value)
    spreads = {role: spread_of(members) for role, members in grouped.items()}
    return {role: spread for role, spread in spreads.items() if spread is not None}


def by_block_and_role(
    matrices: Iterable[MatrixId],
) -> dict[tuple[str, str], list[MatrixId]]:
    """(block label, role) -> matrix ids, in their order: the experts of a block come together."""
    grouped: dict[tuple[str, str], list[MatrixId]] = defaultdict(list)
    for matrix in matrices:
        grouped[block_label(matrix), matrix.role].append(matrix)
    return dict(grouped)


def block_label(matrix: MatrixId) -> str:
    """The block's number, `mtp.0` in multi-token prediction, nothing outside."""
    return matrix.container if matrix.block is None else str(matrix.block)


def text_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table in plain text: first column to the left, the others to the right."""
    lines = [[str(cell) for cell in row] for row in [header, *rows]]
    widths = [max(len(row[column]) for row in lines) for column in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in lines
    )


def role_table(
    counts: Mapping[str, int],
    exponents: Mapping[str, Spread],
    multipliers: Mapping[str, Spread],
    estimator: str = "hill_median",
) -> str:
    """Per role: number of matrices, mean of the exponents of an estimator, range of multipliers."""
    rows = [
        (
            role,
            counts[role],
            f"{exponents[role].mean:.3f}" if role in exponents else "-",
            f"{factor.low:.3f} to {factor.high:.3f}",
        )
        for role, factor in multipliers.items()
    ]
    return text_table(("role", "matrices", f"mean alpha_{estimator}", "multiplier"), rows)


def matrix_table(
    matrix_index: MatrixIndex,
    owners: Mapping[MatrixId, int],
    multipliers: Mapping[MatrixId, float],
    steps: Mapping[MatrixId, str] = MappingProxyType({}),
) -> str:
    """Every matrix with its role, shape, the ranks that hold it, its owner and its multiplier.

    With `steps`, also whether it has a hyperball step or why not.
    """
    header = ["matrix", "role", "shape", "shards", "owner", "multiplier"]
    rows = [
        (
            matrix,
            matrix.role,
            f"{info.rows}x{info.columns}",
            shards_of(info),
            owners.get(matrix, "-"),
            f"{multipliers.get(matrix, 1.0):.4f}",
            *([steps[matrix]] if steps else []),
        )
        for matrix, info in matrix_index.items()
    ]
    return text_table([*header, "step"] if steps else header, rows)


def shards_of(info: MatrixInfo) -> str:
    """Number of shards, the ranks of the first replica, and the number of replicas."""
    replicas = len(info.holders)
    ranks = ",".join(str(rank) for rank in info.holders[0])
    shards = f"{len(info.holders[0]) if info.split else 1} on ranks {ranks}"
    return shards + (f" (x{replicas})" if replicas > 1 else "")


def block_table(
    matrix_index: MatrixIndex,
    owners: Mapping[MatrixId, int],
    multipliers: Mapping[MatrixId, float],
    steps: Mapping[MatrixId, str] = MappingProxyType({}),
) -> str:
    """Every role of every block: matrices, their shapes, how many ranks own them, multipliers.

    With `steps`, also whether they have a hyperball step or why not.
    """
    header = ["block", "role", "matrices", "shape", "owners", "multiplier"]
    rows = []
    for (block, role), matrices in by_block_and_role(matrix_index).items():
        shapes = {f"{matrix_index[m].rows}x{matrix_index[m].columns}" for m in matrices}
        factor = spread_of(multipliers.get(matrix, 1.0) for matrix in matrices)
        assert factor is not None
        rows.append(
            (
                block or "-",
                role,
                len(matrices),
                ", ".join(sorted(shapes)),
                len({owners[matrix] for matrix in matrices if matrix in owners}) or "-",
                f"{factor.low:.4f} to {factor.high:.4f}",
                *([", ".join(sorted({steps[matrix] for matrix in matrices}))] if steps else []),
            )
        )
    return text_table([*header, "step"] if steps else header, rows)
