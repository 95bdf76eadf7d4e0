"""Exponents of a measurement in, target multipliers out: the mapping over a whole model."""

import math
from collections import defaultdict
from collections.abc import Mapping

from megatron_llr.config import LLRConfig
from megatron_llr.matrices.ids import EMBEDDING_IDS, MatrixId
from megatron_llr.policies.mappings import BOUNDED, MAPPINGS, Bounds, Scale

WITHIN_BLOCK = "block-"


def _usable(alpha: float) -> bool:
    # An exponent is 1 + n / (a positive sum), so anything else is no exponent.
    return math.isfinite(alpha) and alpha > 1


def _kind(config: LLRConfig) -> str:
    return config.mapping.removeprefix(WITHIN_BLOCK)


def _fit(pool: Mapping[MatrixId, float], config: LLRConfig) -> Scale | None:
    """The configured mapping, fitted to one pool of exponents."""
    bounds = Bounds(config.min_multiplier, config.max_multiplier, config.quantile, config.inverse)
    return MAPPINGS[_kind(config)](list(pool.values()), bounds)


def _scales(pool: Mapping[MatrixId, float], config: LLRConfig) -> dict[MatrixId, Scale]:
    """Scale of every matrix of the pool: one for the model, or one for each block."""
    within_block = config.mapping.startswith(WITHIN_BLOCK)
    pools: dict[str, dict[MatrixId, float]] = defaultdict(dict)
    for matrix, alpha in pool.items():
        pools[matrix.container if within_block else ""][matrix] = alpha
    scales: dict[MatrixId, Scale] = {}
    for members in pools.values():
        scale = _fit(members, config)
        if scale is not None:
            scales.update(dict.fromkeys(members, scale))
    return scales


def _embedding_target(
    alpha: float | None,
    pool: Mapping[MatrixId, float],
    targets: Mapping[MatrixId, float],
    config: LLRConfig,
) -> float | None:
    fixed = config.embedding_multiplier()
    if config.embedding == "max":
        bounded = _kind(config) in BOUNDED
        return fixed if bounded else max(targets.values(), default=None)
    if fixed is not None:
        return fixed
    if alpha is None or not _usable(alpha) or not pool:
        return None
    scale = _fit(pool, config)
    return scale(alpha) if scale else None


def assign_multipliers(
    alphas: Mapping[MatrixId, float], config: LLRConfig
) -> dict[MatrixId, float]:
    """Target multiplier of every matrix from its exponent: LLR, arXiv 2605.22297.

    Embedding, position embedding and head stay out of the pool that the mapping is fitted to; they
    follow `config.embedding`.

    Args:
        alphas: matrix id -> exponent; one that could not be fitted is NaN. Embedding-like ids that
            were not measured may carry NaN.
        config: mapping, bounds, direction, embedding policy.

    Returns:
        Matrix id -> multiplier, finite and above 0. A matrix that no multiplier can be given (its
        exponent missing or not finite, or all exponents of its pool equal) is left out, so that it
        keeps the one it has.
    """
    pool = {
        matrix: alpha
        for matrix, alpha in alphas.items()
        if matrix not in EMBEDDING_IDS and _usable(alpha)
    }
    scales = _scales(pool, config)
    targets = {matrix: scale(pool[matrix]) for matrix, scale in scales.items()}
    if config.mean_preserving and targets:
        mean = sum(targets.values()) / len(targets)
        targets = {matrix: target / mean for matrix, target in targets.items()}
    for matrix in alphas:
        if matrix == "head" and config.hyperball and config.embedding != "measured":
            # Its rate is already relative to its norm, as that of the other matrices.
            targets[matrix] = 1.0
        elif matrix in EMBEDDING_IDS:
            target = _embedding_target(alphas[matrix], pool, targets, config)
            if target is not None:
                targets[matrix] = target
    return {
        matrix: target for matrix, target in targets.items() if math.isfinite(target) and target > 0
    }
