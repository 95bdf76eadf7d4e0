"""Which matrices share a multiplier, and what they share: the mean of theirs, by size."""

from collections import defaultdict
from collections.abc import Collection, Mapping

from megatron_llr.records import EMBEDDING_IDS, Directory, MatrixInfo, block_key, role_of


def _shares_with(
    info: MatrixInfo, granularity: str, inseparable: Collection[str], held: Collection[str]
) -> str:
    """Name of the set of matrices that this one shares a multiplier with; its own id if alone."""
    alone = info.matrix in EMBEDDING_IDS or info.matrix in held
    if granularity in ("role", "block") and info.tunable and not alone:
        return role_of(info.matrix) if granularity == "role" else block_key(info.matrix)
    if granularity == "parameter" or info.matrix in inseparable:
        return info.cluster
    return info.matrix


def share_multipliers(
    targets: Mapping[str, float],
    directory: Directory,
    granularity: str,
    inseparable: Collection[str] = (),
    held: Collection[str] = (),
) -> dict[str, float]:
    """Replace the multipliers of matrices that share one by their mean, weighted by size.

    Args:
        targets: matrix id -> multiplier; a matrix that is not named has 1.
        directory: all matrices of the job.
        granularity: `projection`, `parameter`, `role` or `block`.
        inseparable: matrices that share their Megatron parameter's multiplier whatever the
            granularity, because their optimizer cannot step parts of a tensor.
        held: matrices that are no part of their role or block (`held_at_one`).

    Returns:
        Multiplier of every matrix of the directory. Matrices too small to be measured stay at 1,
        except that at `parameter` they take part in the mean of their parameter.
    """
    shared: dict[str, list[MatrixInfo]] = defaultdict(list)
    for info in directory.values():
        shared[_shares_with(info, granularity, inseparable, held)].append(info)
    multipliers: dict[str, float] = {}
    for members in shared.values():
        values = [targets.get(info.matrix, 1.0) for info in members]
        # An exact mean of equal values, so that sharing changes nothing where nothing differs.
        mean = values[0]
        if len(set(values)) > 1:
            sizes = [info.numel for info in members]
            mean = sum(v * n for v, n in zip(values, sizes, strict=True)) / sum(sizes)
        multipliers.update((info.matrix, mean) for info in members)
    return {matrix: multipliers[matrix] for matrix in directory}
