"""The exponent sets weight decay instead of the learning rate: AlphaDecay, arXiv 2506.14562."""

from collections.abc import Mapping
from dataclasses import replace

from megatron_llr.config import LLRConfig
from megatron_llr.matrices.ids import MatrixId
from megatron_llr.policies.assign import assign_multipliers


def alphadecay(alphas: Mapping[MatrixId, float], config: LLRConfig) -> dict[MatrixId, float]:
    """AlphaDecay (He et al., arXiv 2506.14562): the heavier the tail, the weaker the decay.

    The multipliers are factors on `--weight-decay`; learning rates stay the base rate. The mapping
    is that of `esd`; embedding and head keep the base decay. The authors' AdamW runs
    (hed-ucas/AlphaDecay at 23ce27c) are `--llr-min-multiplier 0.6666 --llr-max-multiplier 5
    --llr-interval 500 --llr-active-fraction 1 --llr-ramp-iters 0`, Adam with a largest multiplier
    of 3. Their code also leaves out the first and the last module of the model, this does not.
    """
    return assign_multipliers(alphas, replace(config, embedding="one"))
