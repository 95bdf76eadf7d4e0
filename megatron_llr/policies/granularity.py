"""Which matrices share a multiplier, and what they share: the mean of theirs, by size."""

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence

from megatron_llr.records import EMBEDDING_IDS, Directory, MatrixInfo, block_key, role_of


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
        except that they take part in the mean of a parameter that shares one.
    """
    shared = _means(
        {matrix: targets.get(matrix, 1.0) for matrix in directory},
        {matrix: _shares_with(info, granularity, held) for matrix, info in directory.items()},
        directory,
    )
    # Last: a role or a block may have given the parts of one parameter different means.
    clusters = {m: info.cluster if m in inseparable else m for m, info in directory.items()}
    return _means(shared, clusters, directory)


def _means(
    values: Mapping[str, float], sets: Mapping[str, str], directory: Directory
) -> dict[str, float]:
    """The mean of its set, by size, in place of every value."""
    members: dict[str, list[str]] = defaultdict(list)
    for matrix, name in sets.items():
        members[name].append(matrix)
    means = {name: _mean(found, values, directory) for name, found in members.items()}
    return {matrix: means[name] for matrix, name in sets.items()}


def _mean(matrices: Sequence[str], values: Mapping[str, float], directory: Directory) -> float:
    found = [values[matrix] for matrix in matrices]
    # Exactly the value where all are equal, so that sharing changes nothing there.
    if len(set(found)) == 1:
        return found[0]
    sizes = [directory[matrix].numel for matrix in matrices]
    return sum(v * n for v, n in zip(found, sizes, strict=True)) / sum(sizes)
