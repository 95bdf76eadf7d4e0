"""Per-role summaries and the lines that a person reads."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from megatron_llr.records import Directory, role_of


@dataclass(frozen=True)
class Spread:
    """Mean, smallest and largest of a quantity over the matrices of one role."""

    mean: float
    low: float
    high: float


def by_role(values: Mapping[str, float]) -> dict[str, Spread]:
    """Role -> spread of a quantity, roles in the order of their first matrix; NaN is left out."""
    grouped: dict[str, list[float]] = defaultdict(list)
    for matrix, value in values.items():
        if value == value:
            grouped[role_of(matrix)].append(value)
    return {
        role: Spread(sum(found) / len(found), min(found), max(found))
        for role, found in grouped.items()
    }


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


def role_table(alphas: Mapping[str, float], multipliers: Mapping[str, float]) -> str:
    """Per role: number of matrices, mean alpha_hill_median, range of multipliers."""
    exponents, factors = by_role(alphas), by_role(multipliers)
    counts: dict[str, int] = defaultdict(int)
    for matrix in multipliers:
        counts[role_of(matrix)] += 1
    rows = [
        (
            role,
            counts[role],
            f"{exponents[role].mean:.3f}" if role in exponents else "-",
            f"{factor.low:.3f} to {factor.high:.3f}",
        )
        for role, factor in factors.items()
    ]
    return text_table(("role", "matrices", "mean alpha_hill_median", "multiplier"), rows)


def matrix_table(
    directory: Directory, owners: Mapping[str, int], multipliers: Mapping[str, float]
) -> str:
    """Every matrix with its role, shape, the ranks that hold it, its owner and its multiplier."""
    rows = []
    for matrix, info in directory.items():
        replicas = len(info.holders)
        holders = ",".join(str(rank) for rank in info.holders[0])
        shards = f"{len(info.holders[0]) if info.split else 1} on ranks {holders}"
        rows.append(
            (
                matrix,
                role_of(matrix),
                f"{info.rows}x{info.columns}",
                shards + (f" (x{replicas})" if replicas > 1 else ""),
                owners.get(matrix, "-"),
                f"{multipliers.get(matrix, 1.0):.4f}",
            )
        )
    return text_table(("matrix", "role", "shape", "shards", "owner", "multiplier"), rows)
