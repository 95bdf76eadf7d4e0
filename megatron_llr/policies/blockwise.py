"""Fixed ratios by type of block: "The Sharpness Disparity Principle", arXiv 2502.19002."""

from collections.abc import Mapping

from megatron_llr.config import LLRConfig
from megatron_llr.matrices.ids import EMBEDDING_IDS, MatrixId, value_for_role
from megatron_llr.policies.mean import mean_one

# Ratios to the rate of the norms, whose multiplier is 1 here always (README of the authors' code,
# Wongboo/BlockwiseLearningRate at 30f42b9; tuned once, on a LLaMA of 0.25B).
_BY_ROLE: Mapping[str, float] = {
    **dict.fromkeys(("q", "k"), 8.0),
    **dict.fromkeys(("v", "o"), 4.0),
    **dict.fromkeys(("gate", "up", "down"), 6.0),
    **dict.fromkeys(EMBEDDING_IDS, 10.0),
}


def blockwise(alphas: Mapping[MatrixId, float], config: LLRConfig) -> dict[MatrixId, float]:
    """Blockwise learning rates (Wang et al., ICML 2025, arXiv 2502.19002).

    v, o at 4, the feed-forward matrices at 6, q, k at 8, embedding and head at 10 times the base
    rate, which is that of the norms; a matrix of another kind (latent projections, Mamba) keeps 1.
    The base rate is meant to be smaller than a uniform one by as much: with `--llr-mean-preserving`
    all are divided by the mean over the matrices in the blocks, and the same `--lr` serves.
    """
    return mean_one({matrix: value_for_role(_BY_ROLE, matrix, 1.0) for matrix in alphas}, config)
