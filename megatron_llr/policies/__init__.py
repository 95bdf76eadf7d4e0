"""From exponents to multipliers: no torch, no megatron."""

from megatron_llr.policies.assign import assign_multipliers
from megatron_llr.policies.constant import meaning_of, read_role_table
from megatron_llr.policies.granularity import share_multipliers
from megatron_llr.policies.registry import acts_on, held_at_one, targets_for

__all__ = [
    "acts_on",
    "assign_multipliers",
    "held_at_one",
    "meaning_of",
    "read_role_table",
    "share_multipliers",
    "targets_for",
]
