"""Exponents that depend on the shape only, in place of measured ones: the policy `shape`."""

import math
from collections.abc import Mapping

import torch.distributed as dist

from megatron_llr.matrices.ids import MatrixId
from megatron_llr.matrices.info import MatrixIndex
from megatron_llr.ranks import gather_objects, together
from megatron_llr.spectrum.random_shape import random_exponent


def shape_exponents(
    alphas: Mapping[MatrixId, float], matrix_index: MatrixIndex
) -> dict[MatrixId, float]:
    """The expected exponent of a random matrix of the same shape for every matrix with an exponent.

    Rank 0 draws, so that all ranks have the same values on any mix of processors. Enter on all
    ranks.

    Args:
        alphas: matrix id -> measured exponent, the same on every rank; NaN remains NaN.
        matrix_index: all matrices of the job.
    """
    measured = [matrix for matrix, alpha in alphas.items() if math.isfinite(alpha)]
    shapes = {
        matrix: (matrix_index[matrix].rows, matrix_index[matrix].columns) for matrix in measured
    }
    first = not dist.is_initialized() or dist.get_rank() == 0

    def draw() -> dict[tuple[int, int], float]:
        return {shape: random_exponent(*shape) for shape in set(shapes.values())} if first else {}

    drawn = gather_objects(together(draw))[0]
    return {**alphas, **{matrix: drawn[shape] for matrix, shape in shapes.items()}}
