"""`MatrixInfo`: what every rank knows of a logical matrix."""

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_llr.matrices.ids import MatrixId

# A tail fitted to fewer eigenvalues says nothing (Layer-wise-Learning-Rate: eigs_thresh).
MIN_EIGENVALUES = 50


@dataclass(frozen=True, slots=True)
class MatrixInfo:
    """What every rank knows of a logical matrix, wherever it lies.

    Attributes:
        matrix: its id.
        parameter_id: id of the Megatron parameter that holds it.
        rows: rows of the whole matrix.
        columns: its columns.
        holders: the groups of global ranks that hold it between them: one group per data-parallel
            replica, each in tensor-parallel order.
        split: whether the ranks of a group hold different parts.
    """

    matrix: MatrixId
    parameter_id: str
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
        """Whether it is measured. If not, only the policy `fixed` gives it a multiplier."""
        return self.num_eigenvalues >= MIN_EIGENVALUES


MatrixIndex = Mapping[MatrixId, MatrixInfo]
"""Matrix id -> what is known of it, over the whole job; identical on every rank, ordered."""
