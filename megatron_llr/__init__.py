"""Layerwise learning rates for Megatron-Core: every weight matrix its own, from its spectrum.

The names here are loaded when they are first used, so that importing the package imports neither
torch nor megatron.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from megatron_llr.version import __version__

if TYPE_CHECKING:
    from megatron_llr.config import LLRConfig
    from megatron_llr.controller import LayerwiseController
    from megatron_llr.megatron.library import (
        add_layer_groups,
        get_megatron_optimizer,
        make_controller,
    )
    from megatron_llr.policies import assign_multipliers
    from megatron_llr.schedule import MultiplierSchedule
    from megatron_llr.spectrum import analyze_matrix
    from megatron_llr.spectrum.record import SpectrumRecord

_HOMES = {
    "LLRConfig": "megatron_llr.config",
    "LayerwiseController": "megatron_llr.controller",
    "MultiplierSchedule": "megatron_llr.schedule",
    "SpectrumRecord": "megatron_llr.spectrum.record",
    "add_layer_groups": "megatron_llr.megatron.library",
    "analyze_matrix": "megatron_llr.spectrum",
    "assign_multipliers": "megatron_llr.policies",
    "get_megatron_optimizer": "megatron_llr.megatron.library",
    "make_controller": "megatron_llr.megatron.library",
}

__all__ = [
    "LLRConfig",
    "LayerwiseController",
    "MultiplierSchedule",
    "SpectrumRecord",
    "__version__",
    "add_layer_groups",
    "analyze_matrix",
    "assign_multipliers",
    "get_megatron_optimizer",
    "make_controller",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
