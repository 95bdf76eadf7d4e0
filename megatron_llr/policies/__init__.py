"""From exponents to multipliers: no torch, no megatron."""

from megatron_llr.policies.assign import assign_multipliers
from megatron_llr.policies.granularity import share_multipliers, share_saved
from megatron_llr.policies.registry import acts_on, held_at_one, targets_for
from megatron_llr.policies.role_table import (
    decay_factors,
    meaning_of,
    read_role_table,
    report_table,
)

__all__ = [
    "acts_on",
    "assign_multipliers",
    "decay_factors",
    "held_at_one",
    "meaning_of",
    "read_role_table",
    "report_table",
    "share_multipliers",
    "share_saved",
    "targets_for",
]
