"""`SpectrumRecord`: the result of measuring one logical matrix."""

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_llr.matrices.ids import MatrixId


@dataclass(frozen=True, slots=True)
class SpectrumRecord:
    """Spectral metrics of one logical matrix.

    Eigenvalues are those of WᵀW (squared singular values), ascending, not divided by the number of
    rows. An exponent that was not requested is None; one that could not be fitted is NaN.

    Attributes:
        alpha_hill_median: tail exponent over the upper half of the spectrum (arXiv 2605.22297).
        alpha_ks: tail exponent at the tail start of minimal Kolmogorov-Smirnov distance.
        alpha_fix_finger: the same, with the tail start restricted to near the spectrum's peak.
        alpha_hat: softplus(alpha_hill_median * log10 lambda_max).
        spectral_norm: largest singular value.
        frobenius_norm: square root of the sum of the eigenvalues.
        stable_rank: sum of the eigenvalues divided by the largest.
        entropy: spectral entropy, 0 to about 1.
        num_eigenvalues: min(rows, cols), or the number pooled with `--llr-spectrum sharded` or
            `farms`; all other fields then also describe the pooled spectrum.
        fit_distance: KS distance between the upper half and its fit; large means a poor fit.
        method: how the eigenvalues were computed: `gram32`, `gram64`, `svd64`, `pooled`, `farms`,
            or `failed`.
    """

    alpha_hill_median: float
    alpha_ks: float | None
    alpha_fix_finger: float | None
    alpha_hat: float
    spectral_norm: float
    frobenius_norm: float
    stable_rank: float
    entropy: float
    num_eigenvalues: int
    fit_distance: float
    method: str

    def alpha(self, estimator: str) -> float | None:
        """The exponent of an estimator (`--llr-estimator`), or None if it was not fitted."""
        value: float | None = getattr(self, f"alpha_{estimator}")
        return value


SpectrumTable = Mapping[MatrixId, SpectrumRecord]
"""Matrix id -> record; identical on every rank."""
