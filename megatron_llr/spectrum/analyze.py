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


# Columns of what is computed on the device for each spectrum.
_TOTAL, _LARGEST, _HILL, _ENTROPY, _DISTANCE = range(5)
# Spectra whose metrics are computed at once: 256 of 8192 eigenvalues in fp64 are 16 MiB.
_AT_ONCE = 256


def _softplus(value: float) -> float:
    return max(value, 0.0) + math.log1p(math.exp(-abs(value)))


def _entropies(eigenvalues: torch.Tensor) -> torch.Tensor:
    probabilities = eigenvalues / eigenvalues.sum(1, keepdim=True) + _ENTROPY_EPSILON
    ranks = (eigenvalues.sqrt() > _ENTROPY_EPSILON).sum(1).double()
    totals = -(probabilities * probabilities.log()).sum(1)
    return torch.where(ranks > 1, totals / (ranks + _ENTROPY_EPSILON).log(), torch.nan)


def _metrics(eigenvalues: torch.Tensor) -> torch.Tensor:
    """What a record holds, but for the searching fits; [B, N] -> [B, 5], without a copy."""
    hill = tail_fit.hill_medians(eigenvalues)
    distances = tail_fit.fit_distances(eigenvalues, eigenvalues.shape[1] // 2, hill)
    sums, largest = eigenvalues.sum(1), eigenvalues[:, -1]
    return torch.stack([sums, largest, hill, _entropies(eigenvalues), distances], dim=1)


def _check_estimators(estimators: Sequence[str]) -> None:
    unknown = sorted(set(estimators) - set(ESTIMATORS))
    if unknown:
        raise user_error(
            "unknown estimator",
            got=", ".join(unknown),
            allowed=", ".join(ESTIMATORS),
            remedy="set --llr-estimator",
        )


@torch.no_grad()
def records_from_eigenvalues(
    eigenvalues: Sequence[torch.Tensor],
    *,
    estimators: Sequence[str] = ("hill_median",),
    methods: Sequence[str],
) -> list[SpectrumRecord]:
    """Fit spectra of equal length and compute their metrics, with one copy from the device.

    `ks` and `fix_finger` are searched spectrum by spectrum, with copies of their own.

    Args:
        eigenvalues: [N] fp64 each, as of `record_from_eigenvalues`, on one device.
        estimators: which exponents to fit; alpha_hill_median always is.
        methods: how the eigenvalues of each were got.

    Raises:
        ValueError: if an estimator is unknown.
    """
    _check_estimators(estimators)
    if not eigenvalues:
        return []
    chunks = [eigenvalues[at : at + _AT_ONCE] for at in range(0, len(eigenvalues), _AT_ONCE)]
    metrics = torch.cat([_metrics(torch.stack(list(chunk))) for chunk in chunks]).tolist()
    return [
        _record(values, row, estimators, method)
        for values, row, method in zip(eigenvalues, metrics, methods, strict=True)
    ]


def _record(
    eigenvalues: torch.Tensor, row: Sequence[float], estimators: Sequence[str], method: str
) -> SpectrumRecord:
    largest, total = row[_LARGEST], row[_TOTAL]
    has_spectrum = math.isfinite(total) and largest > 0
    hill = row[_HILL] if has_spectrum else math.nan
    searched = {
        name: (fit(eigenvalues) if has_spectrum else math.nan) if name in estimators else None
        for name, fit in _SEARCHING_FITS.items()
    }
    return SpectrumRecord(
        alpha_hill_median=hill,
        alpha_ks=searched["ks"],
        alpha_fix_finger=searched["fix_finger"],
        alpha_hat=_softplus(hill * math.log10(largest)) if has_spectrum else math.nan,
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
        eigenvalues: [N] fp64 eigenvalues of WᵀW, ascending; NaN throughout if there are none.
        estimators: which exponents to fit; alpha_hill_median always is.
        method: how the eigenvalues were got; `failed` takes its place where they are not finite.

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
        estimators: exponents to fit, of `hill_median`, `ks`, `fix_finger`; the last two need the
            small eigenvalues and so an fp64 Gram matrix.

    Raises:
        ValueError: if `weight` is not a matrix of real floating-point values that lie in memory, or
            an estimator is unknown.
    """
    full = any(name in _SEARCHING_FITS for name in estimators)
    eigenvalues, method = eigenvalues_of(weight, full=full)
    return record_from_eigenvalues(eigenvalues, estimators=estimators, method=method)
