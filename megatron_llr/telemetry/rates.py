"""Learning rates, norms and relative updates of matrices, from sums over the job."""

import math
from collections.abc import Collection, Mapping, Sequence

from megatron_llr.matrices.ids import MatrixId
from megatron_llr.matrices.info import MatrixIndex
from megatron_llr.telemetry.observer import MatrixRates


def matrix_rates(
    matrix_index: MatrixIndex,
    norms: Sequence[float],
    base_rates: Sequence[float],
    relative_updates: Sequence[float | None],
    cosines: Sequence[float | None],
    multipliers: Mapping[MatrixId, float],
    *,
    on_rate: bool,
    relative_rates: Collection[MatrixId] = (),
) -> dict[MatrixId, MatrixRates]:
    """What an update did to every matrix.

    Args:
        matrix_index: all matrices of the job.
        norms: Frobenius norm of every matrix after the update, in the order of the index.
        base_rates: base learning rate that it used; NaN where unknown.
        relative_updates: norm of its change over that of the weights; None where not recorded.
        cosines: between weights and update direction; None without a hyperball step.
        multipliers: those that the update used.
        on_rate: whether they are factors on the learning rate.
        relative_rates: matrices with a hyperball step, whose learning rate is already relative to
            their norm.
    """
    rates: dict[MatrixId, MatrixRates] = {}
    rows = zip(matrix_index, norms, base_rates, relative_updates, cosines, strict=True)
    for matrix, norm, base_rate, relative, cosine in rows:
        rate = base_rate * (multipliers[matrix] if on_rate else 1.0)
        effective = rate / norm if norm > 0 else math.nan
        if matrix in relative_rates:
            effective = rate
        rates[matrix] = MatrixRates(multipliers[matrix], rate, effective, relative, cosine)
    return rates
