"""The expected exponent of a random Gaussian matrix, a function of its shape only."""

import functools
import math

import numpy as np
import torch

from megatron_llr.spectrum.analyze import records_from_eigenvalues

# Larger matrices are represented by one of the same aspect ratio with this many eigenvalues, whose
# exponent is within 0.3 % of the Marchenko-Pastur limit (2.122 for square matrices, 2.706 for 2:1).
_MOST_EIGENVALUES = 512
# A single exponent scatters by about 1.9 / N, relative (measured, N from 50 to 1024, aspect ratios
# 1 to 8): (1000 / N)^2 draws give the mean to 0.2 %.
_DRAWS_AT_ONE = 1000.0
_LEAST_DRAWS = 16
_SEED = 1234


@functools.cache
def random_exponent(rows: int, columns: int) -> float:
    """Mean alpha_hill_median of matrices with independent, equally distributed Gaussian elements.

    The mean is over seeded draws. W W^T of the smaller side N is drawn as L L^T with Bartlett's
    decomposition: L [N, N] is lower triangular with standard normal elements below the diagonal and
    the root of a chi-square variable with M - i degrees of freedom in row i, M the larger side.

    Args:
        rows: of the whole matrix.
        columns: of the whole matrix.

    Returns:
        The exponent, with a standard error of about 0.2 %.
    """
    small, large = min(rows, columns), max(rows, columns)
    if small > _MOST_EIGENVALUES:
        small, large = _MOST_EIGENVALUES, round(large * _MOST_EIGENVALUES / small)
    draws = max(_LEAST_DRAWS, math.ceil((_DRAWS_AT_ONE / small) ** 2))
    generator = np.random.default_rng(_SEED)
    freedom = large - np.arange(small)
    eigenvalues = []
    for _ in range(draws):
        factor = np.tril(generator.standard_normal((small, small)), -1)
        factor[np.diag_indices(small)] = np.sqrt(generator.chisquare(freedom))
        eigenvalues.append(torch.linalg.eigvalsh(torch.from_numpy(factor @ factor.T)))
    records = records_from_eigenvalues(eigenvalues, methods=["drawn"] * draws)
    return math.fsum(record.alpha_hill_median for record in records) / draws
