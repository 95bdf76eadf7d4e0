"""Which matrices share a multiplier, and what they share: the mean of theirs, by size."""

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence

from megatron_llr.matrices.ids import EMBEDDING_IDS, block_key, role_of
from megatron_llr.matrices.info import MatrixIndex, MatrixInfo


def _shares_with(info: MatrixInfo, granularity: str, held: Collection[str]) -> str:
    """Name of the set of matrices that this one shares a multiplier with; its own id if alone."""
    if granularity == "parameter":
        return info.cluster
    alone = info.matrix in EMBEDDING_IDS or info.matrix in held or not info.tunable
    if granularity == "projection" or alone:
        return info.matrix
    return role_of(info.matrix) if granularity == "role" else block_key(info.matrix)


def share_multipliers(
    targets: Mapping[str, float],
    matrix_index: MatrixIndex,
    granularity: str,
    inseparable: Collection[str] = (),
    held: Collection[str] = (),
) -> dict[str, float]:
    """Replace the multipliers of matrices that share one by their mean, weighted by size.

    Args:
        targets: matrix id -> multiplier; a matrix that is not named has 1.
        matrix_index: all matrices of the job.
        granularity: `projection`, `parameter`, `role` or `block`.
        inseparable: matrices that share their Megatron parameter's multiplier whatever the
            granularity, because their optimizer cannot step parts of a tensor.
        held: matrices that are no part of their role or block (`held_at_one`).

    Returns:
        Multiplier of every matrix of the matrix_index. Matrices too small to be measured stay at 1,
        except that they take part in the mean of a parameter that shares one.
    """
    shared = _means(
        {matrix: targets.get(matrix, 1.0) for matrix in matrix_index},
        {matrix: _shares_with(info, granularity, held) for matrix, info in matrix_index.items()},
        matrix_index,
    )
    # Last: a role or a block may have given the parts of one parameter different means.
    clusters = {m: info.cluster if m in inseparable else m for m, info in matrix_index.items()}
    return _means(shared, clusters, matrix_index)


def _means(
    values: Mapping[str, float], sets: Mapping[str, str], matrix_index: MatrixIndex
) -> dict[str, float]:
    """The mean of its set, by size, in place of every value."""
    members: dict[str, list[str]] = defaultdict(list)
    for matrix, name in sets.items():
        members[name].append(matrix)
    means = {name: _mean(found, values, matrix_index) for name, found in members.items()}
    return {matrix: means[name] for matrix, name in sets.items()}


def _mean(matrices: Sequence[str], values: Mapping[str, float], matrix_index: MatrixIndex) -> float:
    found = [values[matrix] for matrix in matrices]
    # Exactly the value where all are equal, so that sharing changes nothing there.
    if len(set(found)) == 1:
        return found[0]
    sizes = [matrix_index[matrix].numel for matrix in matrices]
    return sum(v * n for v, n in zip(found, sizes, strict=True)) / sum(sizes)
