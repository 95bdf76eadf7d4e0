"""Tail exponents of a spectrum.

Shapes: `N` eigenvalues of WᵀW, ascending, fp64. A tail that starts at index i has n = N - i members
and the exponent a = 1 + n / (sum_{j>=i} ln l_j - n ln l_i); the threshold l_i is itself one of the
n terms and contributes 0 (Layer-wise-Learning-Rate, olmo/LRUnbalance.py).
"""

import math

import torch

# Number of candidates whose KS distances are computed at once: 256 x 8192 fp64 is 16 MiB.
_CANDIDATE_CHUNK = 256
# fix-finger: bins of the histogram of log10 eigenvalues, and the window around its peak
# (Layer-wise-Learning-Rate, olmo/LRUnbalance.py).
_BINS = 100
_WINDOW_BELOW, _WINDOW_ABOVE = 0.95, 1.5

# Largest mean ln(l_j / l_i) that counts as rounding error: an orthogonal 600x600 matrix in fp32 has
# 7e-7 from its fp32 Gram matrix (measured), a Gaussian one 0.8.
_ROUNDING = 1e-5


def fit_distances(eigenvalues: torch.Tensor, start: int, alphas: torch.Tensor) -> torch.Tensor:
    """Kolmogorov-Smirnov distance between each tail from `start` and its power law.

    Args:
        eigenvalues: [B, N] ascending.
        start: first eigenvalue of the tail.
        alphas: [B] exponents.

    Returns:
        [B] distances, 1 where the fit failed.
    """
    tail = eigenvalues[:, start:]
    model = 1 - (tail / tail[:, :1]).pow(1 - alphas[:, None])
    count = tail.shape[1]
    position = torch.arange(count, dtype=tail.dtype, device=tail.device) / count
    distances = (model - position).abs().amax(dim=1)
    usable = torch.isfinite(distances) & torch.isfinite(alphas) & (alphas > 1)
    return torch.where(usable, distances, torch.ones_like(distances))


def _candidate_distances(
    eigenvalues: torch.Tensor, starts: torch.Tensor, alphas: torch.Tensor
) -> torch.Tensor:
    """max_{j>=i} |1 - (l_j/l_i)^(1-a) - (j-i)/n| of every candidate, 1 where a <= 1; [K]."""
    count = eigenvalues.numel()
    index = torch.arange(count, device=eigenvalues.device)
    distances = []
    for chosen, alpha in zip(
        starts.split(_CANDIDATE_CHUNK), alphas.split(_CANDIDATE_CHUNK), strict=True
    ):
        ratio = eigenvalues[None, :] / eigenvalues[chosen, None]
        model = 1 - ratio.pow(1 - alpha[:, None])
        position = (index[None, :] - chosen[:, None]) / (count - chosen[:, None])
        gap = (model - position).abs()
        gap = torch.where(index[None, :] >= chosen[:, None], gap, torch.zeros_like(gap))
        distance = gap.amax(dim=1)
        usable = torch.isfinite(distance) & torch.isfinite(alpha) & (alpha > 1)
        distances.append(torch.where(usable, distance, torch.ones_like(distance)))
    return torch.cat(distances)


def hill_medians(eigenvalues: torch.Tensor) -> torch.Tensor:
    """Exponents of the tails that start at the median (arXiv 2605.22297; i = int(N/2)).

    Args:
        eigenvalues: [B, N] ascending.

    Returns:
        [B] exponents, NaN where a tail contains a zero or its spread is only rounding error.
    """
    tail = eigenvalues[:, eigenvalues.shape[1] // 2 :]
    count = tail.shape[1]
    logs = tail.log()
    spread = logs.sum(1) - count * logs[:, 0]
    usable = (tail[:, 0] > 0) & (spread > _ROUNDING * count)
    return torch.where(usable, 1 + count / spread, torch.nan)


def _search(eigenvalues: torch.Tensor, candidates: torch.Tensor) -> float:
    """Exponent at the candidate tail start of minimal KS distance, the first one if tied."""
    if candidates.numel() == 0:
        return math.nan
    logs = eigenvalues.log()
    # torch's deterministic mode (--deterministic-mode) has no cumsum on a GPU.
    tail_sums = logs.flip(0).cpu().cumsum(0).to(logs.device).flip(0)
    members = torch.arange(logs.numel(), 0, -1, dtype=logs.dtype, device=logs.device)
    # For every tail start; NaN or inf where a tail is degenerate.
    alphas = (1 + members / (tail_sums - members * logs))[candidates]
    distances = _candidate_distances(eigenvalues, candidates, alphas)
    best = int(distances.argmin())
    alpha = float(alphas[best])
    return alpha if math.isfinite(alpha) and alpha > 1 else math.nan


def _positive_starts(eigenvalues: torch.Tensor) -> torch.Tensor:
    """Tail starts i < N - 1 with a positive threshold."""
    return (eigenvalues[:-1] > 0).nonzero().flatten()


def ks(eigenvalues: torch.Tensor) -> float:
    """Exponent at the tail start of minimal KS distance. [N] ascending -> float."""
    return _search(eigenvalues, _positive_starts(eigenvalues))


def fix_finger(eigenvalues: torch.Tensor) -> float:
    """Exponent at the best tail start near the peak of the spectrum's density.

    The peak x is the left edge of the fullest of 100 equal bins of log10 l. Candidates satisfy
    log10(0.95 x) <= l_i <= 1.5 x. The lower bound compares a logarithm with a value, as the
    official code does.

    Args:
        eigenvalues: [N] ascending.

    Returns:
        The exponent, or NaN if no candidate fits.
    """
    starts = _positive_starts(eigenvalues)
    positive = eigenvalues[eigenvalues > 0]
    if positive.numel() < 2 or not bool(positive[-1] > positive[0]):
        return math.nan
    logs = positive.log10().cpu()
    counts, edges = torch.histogram(logs, bins=_BINS)
    peak = 10.0 ** float(edges[int(counts.argmax())])
    lowest, highest = math.log10(_WINDOW_BELOW * peak), _WINDOW_ABOVE * peak
    thresholds = eigenvalues[starts]
    return _search(eigenvalues, starts[(thresholds >= lowest) & (thresholds <= highest)])
