"""The values that flow between the parts: ids, spectrum records, the table of one measurement."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

# Embedding-like matrices: their multiplier follows --llr-embedding, never the mapping.
EMBEDDING_IDS = frozenset({"embedding", "position_embedding", "head"})

# A tail fitted to fewer eigenvalues says nothing (Layer-wise-Learning-Rate: eigs_thresh).
MIN_EIGENVALUES = 50

# The order in which roles are listed, that of the data's way through a block.
ROLES = tuple("embedding position_embedding q k v o gate up down router head".split())

_FIRST_NUMBER = re.compile(r"^(.*?\.)?(\d+)(?:\.|$)")
_EXPERT = re.compile(r"\.expert\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class SpectrumRecord:
    """What one measurement says of one logical matrix.

    Eigenvalues are those of WᵀW (squared singular values), ascending, not divided by rows. An
    exponent that was not asked for is None; one that could not be fitted is NaN.

    Attributes:
        alpha_hill_median: tail exponent over the upper half of the spectrum (arXiv 2605.22297).
        alpha_ks: tail exponent at the tail start of least Kolmogorov-Smirnov distance.
        alpha_fix_finger: the same, with the tail start held near the peak of the spectrum.
        alpha_hat: softplus(alpha_hill_median * log10 lambda_max).
        spectral_norm: largest singular value.
        frobenius_norm: root of the sum of the eigenvalues.
        stable_rank: sum of the eigenvalues over the largest.
        entropy: spectral entropy, 0 to about 1.
        num_eigenvalues: min(rows, cols), or the number pooled with `--llr-spectrum sharded` or
            `farms`, where all other fields speak of the pooled spectrum too.
        fit_distance: KS distance between the upper half and its fit; large means a poor fit.
        method: how the eigenvalues were got: `gram32`, `gram64`, `svd64`, `pooled`, `farms`, or
            `failed`.
    """

    alpha_hill_median: float
    alpha_ks: float | None
    alpha_fix_finger: float | None
    alpha_hat: float
    spectral_norm: float
    frobenius_norm: float
    stable_rank: float
    entropy: float
    num_eigenvalues: int
    fit_distance: float
    method: str

    def alpha(self, estimator: str) -> float | None:
        """The exponent that `--llr-estimator` names, or None if it was not fitted."""
        value: float | None = getattr(self, f"alpha_{estimator}")
        return value


SpectrumTable = Mapping[str, SpectrumRecord]
"""Matrix id -> record; identical on every rank."""


@dataclass(frozen=True, slots=True)
class MatrixInfo:
    """What every rank knows of a logical matrix, wherever it lies.

    Attributes:
        matrix: matrix id.
        cluster: id of the Megatron parameter that holds it.
        rows: rows of the whole matrix.
        columns: its columns.
        holders: the groups of global ranks that hold it between them: one group per data-parallel
            replica, each in tensor-parallel order.
        split: whether the ranks of a group hold different parts.
    """

    matrix: str
    cluster: str
    rows: int
    columns: int
    holders: tuple[tuple[int, ...], ...]
    split: bool

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.rows * self.columns

    @property
    def num_eigenvalues(self) -> int:
        """Size of its spectrum."""
        return min(self.rows, self.columns)

    @property
    def tunable(self) -> bool:
        """Whether its multiplier may differ from 1."""
        return self.num_eigenvalues >= MIN_EIGENVALUES


Directory = Mapping[str, MatrixInfo]
"""Matrix id -> what is known of it, over the whole job; identical on every rank, ordered."""


def block_key(matrix: str) -> str:
    """What tells one block from another in a matrix id: all up to its first number.

    `block.3.mlp.up` gives `block.3`; ids outside the blocks (`embedding`) give themselves. Names of
    Hugging Face modules (`model.layers.3.mlp.up_proj`) work alike.
    """
    found = _FIRST_NUMBER.match(matrix)
    return f"{found[1] or ''}{found[2]}" if found else matrix


def block_of(matrix: str) -> int | None:
    """Global number of the block that a matrix id names, or None outside the blocks."""
    found = _FIRST_NUMBER.match(matrix)
    return int(found[2]) if found and found[1] == "block." else None


def role_of(matrix: str) -> str:
    """What the matrix is for: the last word of its id (`q`, `down`, `embedding`, ...)."""
    return matrix.rsplit(".", 1)[-1]


def expert_of(matrix: str) -> int | None:
    """Global number of the expert that a matrix id names, or None."""
    found = _EXPERT.search(matrix)
    return int(found[1]) if found else None


def model_order(matrix: str) -> tuple[int, int, int, str]:
    """Sort key of a matrix id: embedding, then the blocks by number, then head."""
    block, role = block_of(matrix), role_of(matrix)
    place = 1 if block is not None else 0 if "embedding" in matrix else 2
    rank = ROLES.index(role) if role in ROLES else len(ROLES)
    return (place, block or 0, rank, matrix)
