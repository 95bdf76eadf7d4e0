"""The values that flow between the parts: ids, spectrum records, the table of one measurement."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

# Embedding-like matrices: their multiplier follows --llr-embedding, never the mapping.
EMBEDDING_IDS = frozenset({"embedding", "position_embedding", "head"})

# A tail fitted to fewer eigenvalues says nothing (Layer-wise-Learning-Rate: eigs_thresh).
MIN_EIGENVALUES = 50

# The order in which roles are listed, that of the data's way through a block. Shared experts and
# experts have roles of their own: `expert.up` is another thing than the `up` of a dense block.
ROLES = tuple(
    "embedding position_embedding eh_proj in_proj out_proj q_down q_up kv_down kv_up q k v "
    "attention.gate o router gate up down shared.mix shared.gate shared.up shared.down latent_down "
    "expert.gate expert.up expert.down latent_up head".split()
)
ROUTER = "router"

_FIRST_NUMBER = re.compile(r"^(.*?\.)?(\d+)(?:\.|$)")
_EXPERT = re.compile(r"\.expert\.(\d+)\.")
_QUALIFIED = re.compile(r"\.(?:(attention)\d*\.(gate)|(shared)\.(\w+)|(expert)\.\d+\.(\w+))$")
_PLACES = ("block.", "mtp.")


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
    """What the matrix is for: one of `ROLES`, the same in every block and for every expert.

    The last word of its id (`q`, `down`, `embedding`), with the word before it where that makes it
    another role: `attention.gate`, `shared.up`, `expert.up`.
    """
    found = _QUALIFIED.search(matrix)
    if found:
        return ".".join(word for word in found.groups() if word)
    return matrix.rsplit(".", 1)[-1]


def value_for_role(table: Mapping[str, float], matrix: str, default: float) -> float:
    """What a table of roles says of a matrix; `up` speaks for `expert.up` and `shared.up` too,
    where the table does not name them.

    Args:
        table: role -> value.
        matrix: matrix id.
        default: value of roles that the table does not name.
    """
    role = role_of(matrix)
    general = role.removeprefix("expert.").removeprefix("shared.")
    return table.get(role, table.get(general, default))


def expert_of(matrix: str) -> int | None:
    """Global number of the expert that a matrix id names, or None."""
    found = _EXPERT.search(matrix)
    return int(found[1]) if found else None


def model_order(matrix: str) -> tuple[int, int, int, int, str]:
    """Sort key of a matrix id: embedding, the blocks by number, multi-token prediction, head.

    Within a block by role, experts one after the other.
    """
    found = _FIRST_NUMBER.match(matrix)
    if found and found[1] in _PLACES:
        place, number = 1 + _PLACES.index(found[1]), int(found[2])
    else:
        place, number = 0 if "embedding" in matrix else len(_PLACES) + 1, 0
    role, expert = role_of(matrix), expert_of(matrix)
    rank = ROLES.index(role) if role in ROLES else len(ROLES)
    if expert is not None:
        return (place, number, ROLES.index("expert.gate"), expert, f"{rank:02d}")
    return (place, number, rank, -1, matrix)
