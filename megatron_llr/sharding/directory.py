"""The whole job's logical matrices, as every rank knows them: one gather at construction."""

from collections.abc import Sequence

from megatron_llr.errors import topology_error, user_error
from megatron_llr.ranks import gather_objects
from megatron_llr.records import (
    EMBEDDING_IDS,
    MIN_EIGENVALUES,
    Directory,
    MatrixInfo,
    model_order,
)
from megatron_llr.sharding.shard import MatrixShard


def build_directory(shards: Sequence[MatrixShard]) -> Directory:
    """Merge what every rank holds into one directory. Enter on all ranks.

    Args:
        shards: the catalog of this rank.

    Returns:
        Matrix id -> `MatrixInfo`, in the order of the model, identical on every rank.

    Raises:
        ValueError: if no rank holds a matrix that may be tuned.
        RuntimeError: if ranks disagree about the shape of a matrix.
    """
    told = [
        (shard.matrix, shard.cluster, shard.rows, shard.columns, shard.ranks, shard.split)
        for shard in shards
        if not shard.copy
    ]
    facts: dict[str, tuple[str, int, int, bool]] = {}
    holders: dict[str, set[tuple[int, ...]]] = {}
    for rank, entries in enumerate(gather_objects(told)):
        for matrix, cluster, rows, columns, ranks, split in entries:
            fact = (cluster, rows, columns, split)
            if facts.setdefault(matrix, fact) != fact:
                raise topology_error(
                    f"ranks disagree about the shape of {matrix}",
                    got=f"{facts[matrix]} and, on rank {rank}, {fact}",
                    allowed="one shape",
                    remedy="report this layout; train without --llr-* flags meanwhile",
                )
            holders.setdefault(matrix, set()).add(ranks)
    directory = {
        matrix: MatrixInfo(matrix, cluster, rows, columns, tuple(sorted(holders[matrix])), split)
        for matrix, (cluster, rows, columns, split) in sorted(
            facts.items(), key=lambda item: model_order(item[0])
        )
    }
    require_tunable(directory)
    return directory


def require_tunable(directory: Directory) -> None:
    """Refuse a model in which nothing can be tuned.

    Raises:
        ValueError: if no matrix outside embedding and head has enough eigenvalues.
    """
    if not any(info.tunable for matrix, info in directory.items() if matrix not in EMBEDDING_IDS):
        sizes = sorted({info.num_eigenvalues for info in directory.values()})
        raise user_error(
            "the model has no matrix to tune",
            got=f"{len(directory)} matrices with {sizes or 'no'} eigenvalues",
            allowed=f"at least one matrix of {MIN_EIGENVALUES} eigenvalues or more in a block",
            remedy="raise --hidden-size, or train without --llr-* flags",
        )
