"""Spectra without aspect-ratio bias: pooled over square submatrices (FARMS, arXiv 2506.06280).

The tail exponent of a random matrix depends only on its shape, so the exponents of k in
grouped-query attention and of a feed-forward matrix are not comparable. FARMS (Hu et al., ICML
2025) takes submatrices of one aspect ratio, 1 for language models, and fits the tail to the
eigenvalues of all of them.
"""

import torch

from megatron_llr.spectrum.batched import eigenvalues_in_batches


def window_starts(length: int, size: int, windows: int) -> list[int]:
    """First rows or columns of the windows along one side.

    Equal to `fixed_sampling` of the authors' code (HUST-AI-HYZ/FARMS at 8e07c3f). Its integer step
    can leave the last rows or columns uncovered.

    Args:
        length: rows or columns of the matrix.
        size: rows or columns of a window, at most `length`.
        windows: maximum number of windows, at least 1.
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
        rows: side of a submatrix; reduced to R or C if they are smaller.
        windows: maximum number of submatrices along each side.
        full: as in `eigenvalues_of`.
        memory: bytes that a batch of submatrices may take, as in `eigenvalues_in_batches`.

    Returns:
        [K * side] fp64 eigenvalues of all K submatrices, ascending, and `farms`. All NaN and
        `failed` if the solvers failed for any submatrix.

    Raises:
        ValueError: if `weight` is not a matrix.
    """
    side = min(rows, *weight.shape)
    squares = [
        weight[top : top + side, left : left + side]
        for top in window_starts(weight.shape[0], side, windows)
        for left in window_starts(weight.shape[1], side, windows)
    ]
    spectra = eigenvalues_in_batches(squares, full=full, memory=memory)
    pooled = torch.cat([eigenvalues for eigenvalues, _ in spectra]).sort().values
    if any(method == "failed" for _, method in spectra):
        return torch.full_like(pooled, torch.nan), "failed"
    return pooled, "farms"
