"""Learning rates and weight decays of single parameters in plain Megatron-Core 0.19.

    import FILE
    optimizer = get_megatron_optimizer(
        config, model_chunks, config_overrides=FILE.config_overrides(config, model_chunks)
    )

The rates are absolute and hold for the base rates above, with --lr-warmup-init 0 and without
--decoupled-lr. Expert parallelism is not supported.
"""

import re
from collections.abc import Iterable
from typing import Any

from megatron.core.optimizer import get_standard_config_overrides
from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate

OVERRIDES: dict[str, dict[str, float]] = {}
"""Name of a parameter, with the number of its layer in the whole model -> its override."""

_LAYER = re.compile(r"(decoder\.layers\.\d+)\.(.*)")


def named_parameters(model_chunks: Iterable[Any]) -> dict[str, Any]:
    """Parameters of this rank by name, with layers counted over all pipeline stages."""
    named = {}
    for chunk in model_chunks:
        model = chunk
        while hasattr(model, "module"):
            model = model.module
        modules = dict(model.named_modules())
        for name, parameter in model.named_parameters():
            match = _LAYER.fullmatch(name)
            if match is not None:
                name = f"decoder.layers.{modules[match[1]].layer_number - 1}.{match[2]}"
            if getattr(parameter, "allreduce", True) is False:
                raise ValueError(f"{name} is sharded over experts, whose numbers are not known")
            named[name] = parameter
    return named


def config_overrides(config: Any, model_chunks: Iterable[Any]) -> dict[ParamKey, Any]:
    """Megatron's standard overrides and those above, for `get_megatron_optimizer`.

    Args:
        config: Megatron's OptimizerConfig.
        model_chunks: as given to `get_megatron_optimizer`.
    """
    members: dict[tuple[tuple[str, float], ...], set[int]] = {}
    for name, parameter in named_parameters(model_chunks).items():
        if name in OVERRIDES:
            members.setdefault(tuple(sorted(OVERRIDES[name].items())), set()).add(id(parameter))
    overrides: dict[ParamKey, Any] = dict(get_standard_config_overrides(config))
    for override, ids in members.items():
        predicate = ParamPredicate(str(override), lambda p, ids=ids: id(p) in ids)
        overrides[ParamKey(predicate=predicate)] = dict(override)
    return overrides
