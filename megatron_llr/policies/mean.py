"""The mean of the multipliers held at 1: what tells a policy's order from its mean."""

from collections.abc import Mapping

from megatron_llr.config import LLRConfig, flag
from megatron_llr.errors import input_error
from megatron_llr.matrices.ids import EMBEDDING_IDS, MatrixId


def mean_one(targets: Mapping[MatrixId, float], config: LLRConfig) -> dict[MatrixId, float]:
    """Divide by the mean over all matrices but embedding and head, if `config` asks for it.

    Embedding and head are divided too: a policy that gives them a number of its own gives it
    relative to the others.

    Raises:
        ValueError: if the mean is 0, because all the others are frozen.
    """
    others = [target for matrix, target in targets.items() if matrix not in EMBEDDING_IDS]
    if not config.mean_preserving or not others:
        return dict(targets)
    mean = sum(others) / len(others)
    if mean == 0:
        raise input_error(
            f"{flag('mean_preserving')} divides by the mean multiplier, which is 0: all matrices "
            f"except embedding and head have multiplier 0. Leave out {flag('mean_preserving')}."
        )
    return {matrix: target / mean for matrix, target in targets.items()}
