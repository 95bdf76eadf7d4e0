"""Which rank computes which spectrum: a deterministic balance of cost, the same on every rank."""

from collections.abc import Iterable

from megatron_llr.records import MatrixInfo


def cost(info: MatrixInfo) -> float:
    """Work of one spectrum, in multiply-adds: the eigenvalues of the Gram matrix, then its product.

    The eigensolver takes about 4/3 n³ for the reduction to tridiagonal form (Golub and Van Loan,
    section 8.3), the product n² times the longer side.
    """
    short, long = sorted((info.rows, info.columns))
    return 4 / 3 * short**3 + short**2 * long


def assign_owners(matrices: Iterable[MatrixInfo]) -> dict[str, int]:
    """One owner in the whole job for every matrix: the next costliest to the least loaded holder.

    Any rank that holds a part may own the matrix, so data-parallel replicas share the work.

    Returns:
        Matrix id -> global rank, in the order given.
    """
    listed = list(matrices)
    load: dict[int, float] = {
        rank: 0.0 for info in listed for group in info.holders for rank in group
    }
    owners: dict[str, int] = {}
    for info in sorted(listed, key=lambda info: (-cost(info), info.matrix)):
        candidates = sorted({rank for group in info.holders for rank in group})
        owner = min(candidates, key=lambda rank: (load[rank], rank))
        load[owner] += cost(info)
        owners[info.matrix] = owner
    return {info.matrix: owners[info.matrix] for info in listed}
