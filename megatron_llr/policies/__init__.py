"""From exponents to multipliers: no torch, no megatron."""

from megatron_llr.policies.assign import assign_multipliers
from megatron_llr.policies.granularity import share_multipliers
from megatron_llr.policies.registry import targets_for

__all__ = ["assign_multipliers", "share_multipliers", "targets_for"]
