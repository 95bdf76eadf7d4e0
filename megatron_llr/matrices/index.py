"""The whole job's logical matrices, as every rank knows them: one gather at construction."""

from collections import defaultdict
from collections.abc import Sequence
from functools import cache
from typing import Any

from megatron_llr.errors import topology_error, user_error
from megatron_llr.matrices.ids import EMBEDDING_IDS, MatrixId
from megatron_llr.matrices.info import MIN_EIGENVALUES, MatrixIndex, MatrixInfo
from megatron_llr.matrices.shard import MatrixShard
from megatron_llr.ranks import gather_distinct, gather_objects

_Shape = tuple[str, int, int, bool]
"""Id of the parameter, rows, columns, whether the matrix is split."""


def build_matrix_index(shards: Sequence[MatrixShard]) -> MatrixIndex:
    """Merge what every rank holds into one index. Enter on all ranks.

    Args:
        shards: the catalog of this rank.

    Returns:
        Matrix id -> `MatrixInfo`, in the order of the model, identical on every rank. Matrices
        that lie on the same ranks share one tuple of holders.

    Raises:
        ValueError: if no rank holds a matrix that may be tuned.
        RuntimeError: if ranks disagree about the shape of a matrix.
    """
    own = [shard for shard in shards if not shard.copy]
    groups = {ranks: index for index, ranks in enumerate(dict.fromkeys(s.ranks for s in own))}
    groups_by_rank = gather_objects(list(groups))
    matrices_by_rank = gather_distinct(
        [(s.matrix, s.parameter_id, s.rows, s.columns, s.split, groups[s.ranks]) for s in own]
    )
    # Replicas hold the same matrices in groups of their own: one list serves all of them.
    replicas: dict[int, list[int]] = defaultdict(list)
    for rank, matrices in enumerate(matrices_by_rank):
        replicas[id(matrices)].append(rank)
    shapes: dict[MatrixId, _Shape] = {}
    held_in: dict[MatrixId, list[tuple[int, int]]] = defaultdict(list)
    for ranks in replicas.values():
        for name, *shape, group in matrices_by_rank[ranks[0]]:
            matrix = MatrixId.read(name)
            _check_shape(shapes, matrix, tuple(shape), ranks[0])
            held_in[matrix].append((ranks[0], group))

    @cache
    def holders(places: tuple[tuple[int, int], ...]) -> tuple[tuple[int, ...], ...]:
        return tuple(
            sorted(
                {
                    groups_by_rank[rank][group]
                    for first, group in places
                    for rank in replicas[id(matrices_by_rank[first])]
                }
            )
        )

    matrix_index = {}
    for matrix in sorted(shapes):
        parameter_id, rows, columns, split = shapes[matrix]
        held = holders(tuple(held_in[matrix]))
        matrix_index[matrix] = MatrixInfo(matrix, parameter_id, rows, columns, held, split)
    require_tunable(matrix_index)
    return matrix_index


def _check_shape(shapes: dict[MatrixId, _Shape], matrix: MatrixId, shape: Any, rank: int) -> None:
    if shapes.setdefault(matrix, shape) != shape:
        raise topology_error(
            f"ranks disagree about the shape of {matrix}",
            got=f"{shapes[matrix]} and, on rank {rank}, {shape}",
            allowed="one shape",
            remedy="report this layout, and train without --llr-* flags until it is fixed",
        )


def require_tunable(matrix_index: MatrixIndex) -> None:
    """Refuse a model in which nothing can be tuned.

    Raises:
        ValueError: if no matrix outside embedding and head has enough eigenvalues.
    """
    if not any(
        info.tunable for matrix, info in matrix_index.items() if matrix not in EMBEDDING_IDS
    ):
        sizes = sorted({info.num_eigenvalues for info in matrix_index.values()})
        raise user_error(
            "the model has no matrix to tune",
            got=f"{len(matrix_index)} matrices with {sizes or 'no'} eigenvalues",
            allowed=f"at least one matrix of {MIN_EIGENVALUES} eigenvalues or more in a block",
            remedy="raise --hidden-size, or train without --llr-* flags",
        )
