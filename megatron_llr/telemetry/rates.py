"""Learning rates, norms and relative updates of matrices, from sums over the job."""

import math
from collections.abc import Mapping, Sequence

from megatron_llr.matrices.info import MatrixIndex
from megatron_llr.telemetry.observer import MatrixRates


def matrix_rates(
    matrix_index: MatrixIndex,
    sums: Sequence[Sequence[float]],
    multipliers: Mapping[str, float],
    *,
    on_rate: bool,
) -> dict[str, MatrixRates]:
    """What an update did to every matrix.

    Args:
        matrix_index: all matrices of the job.
        sums: a row per matrix as `LayerGroups.local_sums` gives it, summed over all ranks.
        multipliers: those that the update used.
        on_rate: whether they are factors on the learning rate.
    """
    rates: dict[str, MatrixRates] = {}
    for (matrix, info), row in zip(matrix_index.items(), sums, strict=True):
        squares, count, weighted_rate, changes, recorded = row
        # Replicas bring equal shares: the ratio of element counts is their number.
        norm = (squares * info.numel / count) ** 0.5 if count else 0.0
        factor = multipliers[matrix] if on_rate else 1.0
        rate = weighted_rate / count * factor if count else math.nan
        effective = rate / norm if norm > 0 else math.nan
        # The number of replicas cancels; a change that was recorded only in part is not used.
        known = count and recorded == count
        relative = (changes / squares) ** 0.5 if known and squares != 0 else None
        rates[matrix] = MatrixRates(multipliers[matrix], rate, effective, relative)
    return rates
