"""Multipliers by depth: deeper is lower (or, inverted, higher).

The seed idea "layerwise learning rates" of The AI Scientist (arXiv 2408.06292), whose generated
code was not published; the three formulas are this package's own. For a block b of B the depth is
d = b / (B - 1), from 0 to 1; the embedding has depth 0, the head 1, like all that follows the last
block. f is `--llr-depth-floor`, the multiplier at depth 1. Blocks count, not layers: in a hybrid
model an attention or Mamba layer and the MLP after it are one block.
"""

import math
from collections.abc import Callable, Mapping

from megatron_llr.config import LLRConfig
from megatron_llr.matrices.ids import MatrixId
from megatron_llr.policies.mean import mean_one


def depths(matrices: Mapping[MatrixId, float]) -> dict[MatrixId, float]:
    """Matrix id -> depth, 0 to 1; a single block has depth 0."""
    last = max((matrix.block for matrix in matrices if matrix.block is not None), default=0)

    def depth(matrix: MatrixId) -> float:
        if matrix.block is None:
            return 0.0 if "embedding" in matrix.role else 1.0
        return matrix.block / last if last else 0.0

    return {matrix: depth(matrix) for matrix in matrices}


def _by_depth(
    alphas: Mapping[MatrixId, float], config: LLRConfig, decay: Callable[[float, float], float]
) -> dict[MatrixId, float]:
    targets = {
        matrix: decay(1.0 - depth if config.inverse else depth, config.depth_floor)
        for matrix, depth in depths(alphas).items()
    }
    return mean_one(targets, config)


def linear(alphas: Mapping[MatrixId, float], config: LLRConfig) -> dict[MatrixId, float]:
    """A line: 1 - (1 - f) d (idea: arXiv 2408.06292)."""
    return _by_depth(alphas, config, lambda depth, floor: 1.0 - (1.0 - floor) * depth)


def exponential(alphas: Mapping[MatrixId, float], config: LLRConfig) -> dict[MatrixId, float]:
    """A power, f^d: from block to block the same factor, f^(1 / (B - 1)) (idea: arXiv 2408.06292).

    The layer-wise learning-rate decay of fine-tuning (ULMFiT, arXiv 1801.06146; ELECTRA) is this
    inverted: there the first blocks move least.
    """
    return _by_depth(alphas, config, lambda depth, floor: floor**depth)


def cosine(alphas: Mapping[MatrixId, float], config: LLRConfig) -> dict[MatrixId, float]:
    """Half a cosine: f + (1 - f) (1 + cos(pi d)) / 2 (idea: arXiv 2408.06292)."""
    return _by_depth(
        alphas,
        config,
        lambda depth, floor: floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * depth)),
    )
