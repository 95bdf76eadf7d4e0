"""Controls of the order: what `esd` would give, to other matrices than it would."""

import random as generators
from collections.abc import Mapping
from dataclasses import replace

from megatron_llr.config import LLRConfig
from megatron_llr.matrices.ids import EMBEDDING_IDS, MatrixId
from megatron_llr.policies.assign import assign_multipliers


def random(alphas: Mapping[MatrixId, float], config: LLRConfig) -> dict[MatrixId, float]:
    """The multipliers that LLR (arXiv 2605.22297) gives, permuted over the matrices.

    Same values, same mean, no meaning: a policy whose gain this keeps owes nothing to its order.
    The permutation is that of `--llr-random-seed`, the same at every measurement and on every
    layout; embedding and head keep theirs.
    """
    targets = assign_multipliers(alphas, config)
    others = sorted(matrix for matrix in targets if matrix not in EMBEDDING_IDS)
    values = [targets[matrix] for matrix in others]
    generators.Random(config.random_seed).shuffle(values)
    return {**targets, **dict(zip(others, values, strict=True))}


def inverse(alphas: Mapping[MatrixId, float], config: LLRConfig) -> dict[MatrixId, float]:
    """LLR (arXiv 2605.22297) turned round: the heavier the tail, the larger the rate.

    Its mean differs from that of `esd`: compare the two with `--llr-mean-preserving`.
    """
    return assign_multipliers(alphas, replace(config, inverse=not config.inverse))
