"""Learning rates, norms and relative updates of matrices, from sums over the job."""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from megatron_llr.matrices.ids import MatrixId
from megatron_llr.matrices.info import MatrixIndex
from megatron_llr.telemetry.observer import MatrixRates


def matrix_rates(
    matrix_index: MatrixIndex,
    ratios: Iterable[Sequence[Any]],
    multipliers: Mapping[MatrixId, float],
    hyperball: Collection[MatrixId],
    *,
    on_rate: bool,
) -> dict[MatrixId, MatrixRates]:
    """What an update did to every matrix.

    Args:
        matrix_index: all matrices of the job.
        ratios: four sequences in the order of the index: Frobenius norms after the update; base
            learning rates that it used, NaN where unknown; norms of its change over those of the
            weights, None where not recorded; cosines between weights and update direction, None
            without a hyperball step.
        multipliers: those that the update used.
        hyperball: matrices whose learning rate is already relative to their norm.
        on_rate: whether multipliers are factors on the learning rate.
    """
    rates: dict[MatrixId, MatrixRates] = {}
    for matrix, norm, base_rate, relative, cosine in zip(matrix_index, *ratios, strict=True):
        rate = base_rate * (multipliers[matrix] if on_rate else 1.0)
        effective = rate / norm if norm > 0 else math.nan
        if matrix in hyperball:
            effective = rate
        rates[matrix] = MatrixRates(multipliers[matrix], rate, effective, relative, cosine)
    return rates
