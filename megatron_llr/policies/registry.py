"""The policies by name. A policy turns the exponents of a measurement into target multipliers."""

from collections.abc import Callable, Mapping

from megatron_llr.config import LLRConfig
from megatron_llr.policies.assign import assign_multipliers

Policy = Callable[[Mapping[str, float], LLRConfig], dict[str, float]]


def uniform(alphas: Mapping[str, float], config: LLRConfig) -> dict[str, float]:
    """Every multiplier 1: the control run, measured like the others."""
    return dict.fromkeys(alphas, 1.0)


POLICIES: dict[str, Policy] = {
    # LLR: "One LR Doesn't Fit All", arXiv 2605.22297
    "esd": assign_multipliers,
    "uniform": uniform,
}


def targets_for(alphas: Mapping[str, float], config: LLRConfig) -> dict[str, float]:
    """Targets that `config.policy` gives; a matrix left out keeps its multiplier."""
    return POLICIES[config.policy](alphas, config)
