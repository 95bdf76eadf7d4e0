"""Which matrices share a multiplier, and what they share: the mean of theirs, weighted by size."""

from collections import defaultdict
from collections.abc import Collection, Mapping

from megatron_llr.matrices.ids import EMBEDDING_IDS, MatrixId
from megatron_llr.matrices.info import MatrixIndex, MatrixInfo


def share_multipliers(
    targets: Mapping[MatrixId, float],
    matrix_index: MatrixIndex,
    granularity: str,
    inseparable: Collection[str] = (),
    held: Collection[str] = (),
) -> dict[MatrixId, float]:
    """Replace the multipliers of matrices that share one by their mean, weighted by size.

    Args:
        targets: matrix id -> multiplier; a matrix that is not named has 1.
        matrix_index: all matrices of the job.
        granularity: `projection`, `parameter`, `role` or `block`.
        inseparable: matrices that share their Megatron parameter's multiplier whatever the
            granularity, because their optimizer cannot step parts of a tensor.
        held: matrices that do not count as part of their role or block (`held_at_one`).

    Returns:
        Multiplier of every matrix of the index. Matrices too small to be measured stay at 1, except
        that they take part in the mean of a parameter that shares one.
    """

    def shared_with(info: MatrixInfo) -> str:
        """Name of the set that a matrix shares its multiplier with; its own id if there is none."""
        if granularity == "parameter":
            return info.parameter_id
        excluded = info.matrix in EMBEDDING_IDS or info.matrix in held or not info.tunable
        if granularity == "projection" or excluded:
            return info.matrix
        return info.matrix.role if granularity == "role" else info.matrix.container

    shared = _means(
        {matrix: targets.get(matrix, 1.0) for matrix in matrix_index},
        {matrix: shared_with(info) for matrix, info in matrix_index.items()},
        matrix_index,
    )
    # Last: a role or a block may have given the parts of one parameter different means.
    parameters = {
        matrix: info.parameter_id if matrix in inseparable else matrix
        for matrix, info in matrix_index.items()
    }
    return _means(shared, parameters, matrix_index)


def _means(
    values: Mapping[MatrixId, float], sets: Mapping[MatrixId, str], matrix_index: MatrixIndex
) -> dict[MatrixId, float]:
    """In place of every value, the mean of its set, weighted by size."""
    members: dict[str, list[MatrixId]] = defaultdict(list)
    for matrix, name in sets.items():
        members[name].append(matrix)
    means: dict[str, float] = {}
    for name, matrices in members.items():
        first = values[matrices[0]]
        if all(values[matrix] == first for matrix in matrices):
            # Exactly the value where all are equal, so that sharing changes nothing there.
            means[name] = first
        else:
            sizes = [matrix_index[matrix].numel for matrix in matrices]
            weighted = (values[m] * n for m, n in zip(matrices, sizes, strict=True))
            means[name] = sum(weighted) / sum(sizes)
    return {matrix: means[name] for matrix, name in sets.items()}
