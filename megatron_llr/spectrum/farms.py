"""Spectra without aspect-ratio bias: pooled over square submatrices (FARMS, arXiv 2506.06280).

The tail exponent of a random matrix depends on its shape alone, so that k of grouped-query
attention and a feed-forward matrix cannot be compared as they are. FARMS (Hu et al., ICML 2025)
takes submatrices of one aspect ratio, 1 for language models, and fits the tail to all their
eigenvalues.
"""

import torch

from megatron_llr.spectrum.batched import eigenvalues_in_batches


def window_starts(length: int, size: int, windows: int) -> list[int]:
    """Where the windows along one side begin.

    As `fixed_sampling` of the authors' code (HUST-AI-HYZ/FARMS at 8e07c3f), whose whole-numbered
    step can leave the far edge of a side uncovered.

    Args:
        length: rows or columns of the matrix.
        size: rows or columns of a window, at most `length`.
        windows: how many windows at most, from 1.
    """
    room = length - size
    step = max(1, room // (windows - 1)) if windows > 1 else room + 1
    return [index * step for index in range(min(windows, room // step + 1))]


@torch.no_grad()
def farms_eigenvalues(
    weight: torch.Tensor, rows: int, windows: int, *, full: bool = False, memory: float = 4e9
) -> tuple[torch.Tensor, str]:
    """Pooled eigenvalues of the square submatrices of a matrix.

    Args:
        weight: [R, C], any float dtype, any device.
        rows: side of a submatrix; R or C instead where they are smaller.
        windows: submatrices along each side, at most.
        full: as of `eigenvalues_of`.
        memory: bytes that a batch of submatrices may take, as of `eigenvalues_in_batches`.

    Returns:
        [K * side] fp64 eigenvalues of all K submatrices, ascending, and `farms`; all NaN, with
        `failed`, where any submatrix has none.

    Raises:
        ValueError: if `weight` is not a matrix.
    """
    side = min(rows, *weight.shape)
    squares = [
        weight[top : top + side, left : left + side]
        for top in window_starts(weight.shape[0], side, windows)
        for left in window_starts(weight.shape[1], side, windows)
    ]
    found = eigenvalues_in_batches(squares, full=full, memory=memory)
    pooled = torch.cat([eigenvalues for eigenvalues, _ in found]).sort().values
    if any(method == "failed" for _, method in found):
        return torch.full_like(pooled, torch.nan), "failed"
    return pooled, "farms"
