"""From a matrix, or from eigenvalues, to a `SpectrumRecord`."""

import math
from collections.abc import Callable, Sequence

import torch

from megatron_llr.config import ESTIMATORS
from megatron_llr.errors import user_error
from megatron_llr.spectrum import tail_fit
from megatron_llr.spectrum.eigenvalues import eigenvalues_of
from megatron_llr.spectrum.record import SpectrumRecord

# Added to probabilities and counts in the entropy (Layer-wise-Learning-Rate, olmo/LRUnbalance.py).
_ENTROPY_EPSILON = 6e-5

_SEARCHING_FITS: dict[str, Callable[[torch.Tensor], float]] = {
    "ks": tail_fit.ks,
    "fix_finger": tail_fit.fix_finger,
}


def _softplus(value: float) -> float:
    return max(value, 0.0) + math.log1p(math.exp(-abs(value)))


def _entropy(eigenvalues: torch.Tensor) -> float:
    probabilities = eigenvalues / eigenvalues.sum() + _ENTROPY_EPSILON
    rank = int((eigenvalues.sqrt() > _ENTROPY_EPSILON).sum())
    total = -float((probabilities * probabilities.log()).sum())
    return total / math.log(rank + _ENTROPY_EPSILON) if rank > 1 else math.nan


def record_from_eigenvalues(
    eigenvalues: torch.Tensor,
    *,
    estimators: Sequence[str] = ("hill_median",),
    method: str,
) -> SpectrumRecord:
    """Fit a spectrum and compute its metrics.

    Args:
        eigenvalues: [N] fp64 eigenvalues of WᵀW, ascending; NaN throughout if there are none.
        estimators: which exponents to fit; alpha_hill_median always is.
        method: how the eigenvalues were got; `failed` takes its place where they are not finite.

    Raises:
        ValueError: if an estimator is unknown.
    """
    unknown = sorted(set(estimators) - set(ESTIMATORS))
    if unknown:
        raise user_error(
            "unknown estimator",
            got=", ".join(unknown),
            allowed=", ".join(ESTIMATORS),
            remedy="set --llr-estimator",
        )
    largest, total = float(eigenvalues[-1]), float(eigenvalues.sum())
    has_spectrum = math.isfinite(total) and largest > 0
    hill = tail_fit.hill_median(eigenvalues) if has_spectrum else math.nan
    searched = {
        name: (fit(eigenvalues) if has_spectrum else math.nan) if name in estimators else None
        for name, fit in _SEARCHING_FITS.items()
    }
    start = eigenvalues.numel() // 2
    return SpectrumRecord(
        alpha_hill_median=hill,
        alpha_ks=searched["ks"],
        alpha_fix_finger=searched["fix_finger"],
        alpha_hat=_softplus(hill * math.log10(largest)) if has_spectrum else math.nan,
        spectral_norm=math.sqrt(largest) if largest >= 0 else math.nan,
        frobenius_norm=math.sqrt(total) if total >= 0 else math.nan,
        stable_rank=total / largest if has_spectrum else math.nan,
        entropy=_entropy(eigenvalues) if has_spectrum else math.nan,
        num_eigenvalues=eigenvalues.numel(),
        fit_distance=tail_fit.fit_distance(eigenvalues, start, hill) if has_spectrum else math.nan,
        method=method if math.isfinite(total) else "failed",
    )


def analyze_matrix(
    weight: torch.Tensor, estimators: Sequence[str] = ("hill_median",)
) -> SpectrumRecord:
    """Spectrum record of one whole matrix.

    Args:
        weight: [rows, columns], any float dtype and device.
        estimators: exponents to fit, of `hill_median`, `ks`, `fix_finger`; the last two need the
            small eigenvalues and so an fp64 Gram matrix.

    Raises:
        ValueError: if `weight` is not a matrix or an estimator is unknown.
    """
    full = any(name in _SEARCHING_FITS for name in estimators)
    eigenvalues, method = eigenvalues_of(weight, full=full)
    return record_from_eigenvalues(eigenvalues, estimators=estimators, method=method)
