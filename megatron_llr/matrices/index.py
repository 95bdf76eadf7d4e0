"""The whole job's logical matrices, as every rank knows them: one gather at construction."""

from collections import defaultdict
from collections.abc import Sequence
from functools import cache
from typing import Any

from megatron_llr.errors import topology_error, user_error
from megatron_llr.matrices.ids import EMBEDDING_IDS, model_order
from megatron_llr.matrices.info import MIN_EIGENVALUES, MatrixIndex, MatrixInfo
from megatron_llr.matrices.shard import MatrixShard
from megatron_llr.ranks import gather_distinct, gather_objects

_Fact = tuple[str, int, int, bool]
"""Cluster, rows, columns, whether it is split."""


def build_matrix_index(shards: Sequence[MatrixShard]) -> MatrixIndex:
    """Merge what every rank holds into one matrix_index. Enter on all ranks.

    Args:
        shards: the catalog of this rank.

    Returns:
        Matrix id -> `MatrixInfo`, in the order of the model, identical on every rank. Matrices
        that lie on the same ranks share one tuple of holders.

    Raises:
        ValueError: if no rank holds a matrix that may be tuned.
        RuntimeError: if ranks disagree about the shape of a matrix.
    """
    groups, matrices = _told_by(shards)
    groups_by_rank = gather_objects(groups)
    matrices_by_rank = gather_distinct(matrices)
    # Replicas hold the same matrices in groups of their own: one list stands for all of them.
    alike: dict[int, list[int]] = defaultdict(list)
    for rank, told in enumerate(matrices_by_rank):
        alike[id(told)].append(rank)
    facts: dict[str, _Fact] = {}
    held_in: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for ranks in alike.values():
        for matrix, cluster, rows, columns, split, group in matrices_by_rank[ranks[0]]:
            _check_fact(facts, matrix, (cluster, rows, columns, split), ranks[0])
            held_in[matrix].append((ranks[0], group))

    @cache
    def holders(places: tuple[tuple[int, int], ...]) -> tuple[tuple[int, ...], ...]:
        found = {
            groups_by_rank[rank][group]
            for first, group in places
            for rank in alike[id(matrices_by_rank[first])]
        }
        return tuple(sorted(found))

    matrix_index = {
        matrix: MatrixInfo(matrix, cluster, rows, columns, holders(tuple(held_in[matrix])), split)
        for matrix, (cluster, rows, columns, split) in sorted(
            facts.items(), key=lambda item: model_order(item[0])
        )
    }
    require_tunable(matrix_index)
    return matrix_index


def _told_by(shards: Sequence[MatrixShard]) -> tuple[list[tuple[int, ...]], list[tuple[Any, ...]]]:
    """The groups that hold what this rank holds a part of; the matrices, each with its group."""
    own = [shard for shard in shards if not shard.copy]
    groups = {ranks: index for index, ranks in enumerate(dict.fromkeys(s.ranks for s in own))}
    matrices = [(s.matrix, s.cluster, s.rows, s.columns, s.split, groups[s.ranks]) for s in own]
    return list(groups), matrices


def _check_fact(facts: dict[str, _Fact], matrix: str, fact: _Fact, rank: int) -> None:
    if facts.setdefault(matrix, fact) != fact:
        raise topology_error(
            f"ranks disagree about the shape of {matrix}",
            got=f"{facts[matrix]} and, on rank {rank}, {fact}",
            allowed="one shape",
            remedy="report this layout; train without --llr-* flags meanwhile",
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
