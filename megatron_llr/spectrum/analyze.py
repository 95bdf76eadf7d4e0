"""Computes a `SpectrumRecord` from a matrix or from its eigenvalues."""

import math
from collections.abc import Callable, Sequence

import torch

from megatron_llr.config import ESTIMATORS
from megatron_llr.errors import input_error
from megatron_llr.spectrum import tail_fit
from megatron_llr.spectrum.eigenvalues import eigenvalues_of
from megatron_llr.spectrum.record import SpectrumRecord

# Added to probabilities and counts in the entropy (Layer-wise-Learning-Rate, olmo/LRUnbalance.py).
_ENTROPY_EPSILON = 6e-5

_SEARCHING_FITS: dict[str, Callable[[torch.Tensor], float]] = {
    "ks": tail_fit.ks,
    "fix_finger": tail_fit.fix_finger,
}

# Columns of the metrics that are computed on the device for each spectrum.
_TOTAL, _LARGEST, _HILL, _ENTROPY, _DISTANCE = range(5)
# Number of spectra whose metrics are computed at once: 256 of 8192 eigenvalues in fp64 are 16 MiB.
_CHUNK = 256


def _metrics(eigenvalues: torch.Tensor) -> torch.Tensor:
    """All metrics except the searched exponents; [B, N] -> [B, 5] on the same device."""
    hill = tail_fit.hill_medians(eigenvalues)
    distances = tail_fit.fit_distances(eigenvalues, eigenvalues.shape[1] // 2, hill)
    sums, largest = eigenvalues.sum(1), eigenvalues[:, -1]
    probabilities = eigenvalues / eigenvalues.sum(1, keepdim=True) + _ENTROPY_EPSILON
    ranks = (eigenvalues.sqrt() > _ENTROPY_EPSILON).sum(1).double()
    totals = -(probabilities * probabilities.log()).sum(1)
    entropies = torch.where(ranks > 1, totals / (ranks + _ENTROPY_EPSILON).log(), torch.nan)
    return torch.stack([sums, largest, hill, entropies, distances], dim=1)


@torch.no_grad()
def records_from_eigenvalues(
    eigenvalues: Sequence[torch.Tensor],
    *,
    estimators: Sequence[str] = ("hill_median",),
    methods: Sequence[str],
) -> list[SpectrumRecord]:
    """Fit spectra of equal length and compute their metrics, with one copy from the device.

    `ks` and `fix_finger` are searched for each spectrum, with additional copies.

    Args:
        eigenvalues: [N] fp64 each, as for `record_from_eigenvalues`, all on one device.
        estimators: exponents to fit; alpha_hill_median is always fitted.
        methods: how the eigenvalues of each matrix were computed.

    Raises:
        ValueError: if an estimator is unknown.
    """
    unknown = sorted(set(estimators) - set(ESTIMATORS))
    if unknown:
        raise input_error(
            f"{', '.join(unknown)} is not an estimator. Set --llr-estimator to one of "
            f"{', '.join(ESTIMATORS)}"
        )
    if not eigenvalues:
        return []
    chunks = [eigenvalues[at : at + _CHUNK] for at in range(0, len(eigenvalues), _CHUNK)]
    metrics = torch.cat([_metrics(torch.stack(list(chunk))) for chunk in chunks]).tolist()
    return [
        _make_record(values, row, estimators, method)
        for values, row, method in zip(eigenvalues, metrics, methods, strict=True)
    ]


def _make_record(
    eigenvalues: torch.Tensor, row: Sequence[float], estimators: Sequence[str], method: str
) -> SpectrumRecord:
    largest, total = row[_LARGEST], row[_TOTAL]
    has_spectrum = math.isfinite(total) and largest > 0
    hill = row[_HILL] if has_spectrum else math.nan
    searched = {
        name: (fit(eigenvalues) if has_spectrum else math.nan) if name in estimators else None
        for name, fit in _SEARCHING_FITS.items()
    }
    # alpha_hat is the softplus of this.
    weighted = hill * math.log10(largest) if has_spectrum else math.nan
    return SpectrumRecord(
        alpha_hill_median=hill,
        alpha_ks=searched["ks"],
        alpha_fix_finger=searched["fix_finger"],
        alpha_hat=max(weighted, 0.0) + math.log1p(math.exp(-abs(weighted))),
        spectral_norm=math.sqrt(largest) if largest >= 0 else math.nan,
        frobenius_norm=math.sqrt(total) if total >= 0 else math.nan,
        stable_rank=total / largest if has_spectrum else math.nan,
        entropy=row[_ENTROPY] if has_spectrum else math.nan,
        num_eigenvalues=eigenvalues.numel(),
        fit_distance=row[_DISTANCE] if has_spectrum else math.nan,
        method=method if math.isfinite(total) else "failed",
    )


def record_from_eigenvalues(
    eigenvalues: torch.Tensor,
    *,
    estimators: Sequence[str] = ("hill_median",),
    method: str,
) -> SpectrumRecord:
    """Fit a spectrum and compute its metrics.

    Args:
        eigenvalues: [N] fp64 eigenvalues of WᵀW, ascending; all NaN if the solvers failed.
        estimators: exponents to fit; alpha_hill_median is always fitted.
        method: how the eigenvalues were computed. Recorded as `failed` if they are not finite.

    Raises:
        ValueError: if an estimator is unknown.
    """
    (record,) = records_from_eigenvalues([eigenvalues], estimators=estimators, methods=[method])
    return record


def analyze_matrix(
    weight: torch.Tensor, estimators: Sequence[str] = ("hill_median",)
) -> SpectrumRecord:
    """Spectrum record of one whole matrix.

    Args:
        weight: [rows, columns], any float dtype and device; a quantized tensor is dequantized.
        estimators: exponents to fit: `hill_median`, `ks`, `fix_finger`. The last two need the
            small eigenvalues and therefore an fp64 Gram matrix.

    Raises:
        ValueError: if `weight` is not a matrix of real floating-point values in memory, or an
            estimator is unknown.
    """
    full = any(name in _SEARCHING_FITS for name in estimators)
    eigenvalues, method = eigenvalues_of(weight, full=full)
    return record_from_eigenvalues(eigenvalues, estimators=estimators, method=method)
