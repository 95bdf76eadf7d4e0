"""Which matrices share a multiplier, and what they share: the mean of theirs, weighted by size."""

from collections import defaultdict
from collections.abc import Collection, Mapping
from typing import Any

from megatron_llr.config import flag
from megatron_llr.errors import input_error
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

    Raises:
        ValueError: if a matrix of multiplier 0 shares one with a matrix that is not frozen.
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
    shared = share_over_parameters(shared, matrix_index, inseparable)
    thawed = [matrix for matrix, value in targets.items() if value == 0 and shared[matrix] > 0]
    if thawed:
        matrix = thawed[0]
        if matrix in inseparable:
            cause = "its optimizer cannot step parts of a tensor"
            remedy = "Freeze all of them or none."
        else:
            cause = f"{flag('granularity')} is {granularity}"
            remedy = f"Freeze all of them or none, or set {flag('granularity')} projection."
        raise input_error(
            f"{matrix} has multiplier 0, but shares the mean of several matrices, "
            f"{shared[matrix]:.4g}, because {cause}. {remedy}"
        )
    return shared


def share_saved(
    schedule: Mapping[str, Any], matrix_index: MatrixIndex, inseparable: Collection[str]
) -> Mapping[str, Any]:
    """A saved schedule, averaged over the matrices that this run's optimizer cannot separate.

    The optimizer of the run that saved it may have been able to step parts of a tensor.
    """
    if not inseparable or schedule["observed_at"] is None:
        return schedule
    tables = {
        name: share_multipliers(schedule[name], matrix_index, "projection", inseparable)
        for name in ("old", "new")
    }
    return {**schedule, **tables}


def share_over_parameters(
    values: Mapping[MatrixId, float], matrix_index: MatrixIndex, inseparable: Collection[str]
) -> dict[MatrixId, float]:
    """Replace the values of inseparable matrices by the mean of their parameter, by size.

    Args:
        values: of all matrices of the index.
        matrix_index: all matrices of the job.
        inseparable: as for `share_multipliers`.
    """
    parameters = {
        matrix: info.parameter_id if matrix in inseparable else matrix
        for matrix, info in matrix_index.items()
    }
    return _means(values, parameters, matrix_index)


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
