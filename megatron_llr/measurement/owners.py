"""Assigns each spectrum to a rank, balanced by cost and identical on every rank."""

from collections.abc import Iterable
from heapq import heapify, heapreplace

from megatron_llr.matrices.ids import MatrixId
from megatron_llr.matrices.info import MatrixInfo


def cost(info: MatrixInfo) -> float:
    """Cost of one spectrum in multiply-adds: the Gram matrix and its eigenvalues.

    The eigensolver needs about 4/3 n³ for the reduction to tridiagonal form (Golub and Van Loan,
    section 8.3), the product n² times the longer side.
    """
    short, long = sorted((info.rows, info.columns))
    return 4 / 3 * short**3 + short**2 * long


class _Candidates:
    """The ranks that hold a matrix, in a heap by load. The caller may only increase loads."""

    def __init__(self, ranks: Iterable[int], load: dict[int, float]) -> None:
        self._load = load
        self._heap = [(load.setdefault(rank, 0.0), rank) for rank in ranks]
        heapify(self._heap)

    def least_loaded(self) -> int:
        """The rank with the lowest load, the first one if tied."""
        while True:
            known, rank = self._heap[0]
            if known == self._load[rank]:
                return rank
            heapreplace(self._heap, (self._load[rank], rank))


def assign_owners(matrices: Iterable[MatrixInfo]) -> dict[MatrixId, int]:
    """One owner in the whole job for every matrix, in order of cost: the least loaded holder.

    Any rank that holds a part may own the matrix, so data-parallel replicas share the work.

    Returns:
        Matrix id -> global rank, in the order given.
    """
    listed = list(matrices)
    load: dict[int, float] = {}
    # By identity: matrices of an index that are on the same ranks share one tuple of holders.
    candidates: dict[int, _Candidates] = {}
    for info in listed:
        if id(info.holders) not in candidates:
            ranks = {rank for group in info.holders for rank in group}
            candidates[id(info.holders)] = _Candidates(ranks, load)
    owners: dict[MatrixId, int] = {}
    for info in sorted(listed, key=lambda info: (-cost(info), info.matrix)):
        owner = candidates[id(info.holders)].least_loaded()
        load[owner] += cost(info)
        owners[info.matrix] = owner
    return {info.matrix: owners[info.matrix] for info in listed}
