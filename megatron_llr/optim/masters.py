"""Which tensors the inner optimizers really step, and which slice of which weight each one is."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, eq=False)
class Master:
    """One tensor that an inner optimizer steps.

    Attributes:
        tensor: as it stands in the optimizer's groups; [columns...] whole, or a flat slice.
        parameter: the model parameter that it stands for.
        start: first element of the slice, in the flattened parameter.
    """

    tensor: torch.Tensor
    parameter: torch.nn.Parameter
    start: int = 0

    @property
    def stop(self) -> int:
        """One past the last element of the slice."""
        return self.start + self.tensor.numel()


def leaf_optimizers(optimizer: Any) -> Iterator[Any]:
    """Megatron's wrappers that hold an inner optimizer of their own, chains resolved."""
    for child in getattr(optimizer, "chained_optimizers", [optimizer]):
        if child is not optimizer:
            yield from leaf_optimizers(child)
        elif not getattr(child, "is_stub_optimizer", False):
            yield child


def masters_of(leaf: Any) -> Iterator[Master]:
    """The tensors that one wrapper's inner optimizer steps.

    Distributed optimizer: fp32 shards (or shards of the model's own, with the precision-aware
    optimizer). Half precision without it: whole fp32 copies. Otherwise the parameters themselves.
    """
    if hasattr(leaf, "shard_fp32_from_float16_groups"):
        yield from _sharded(leaf)
    elif hasattr(leaf, "fp32_from_float16_groups"):
        for models, copies in zip(leaf.float16_groups, leaf.fp32_from_float16_groups, strict=True):
            for parameter, copy in zip(models, copies, strict=True):
                yield Master(copy, parameter)
        for group in leaf.fp32_from_fp32_groups:
            for parameter in group:
                yield Master(parameter, parameter)
    else:
        for group in leaf.optimizer.param_groups:
            for parameter in group["params"]:
                yield Master(parameter, parameter)


def _sharded(leaf: Any) -> Iterator[Master]:
    halves = zip(
        leaf.model_float16_groups,
        leaf.shard_fp32_from_float16_groups,
        leaf.shard_float16_groups,
        strict=True,
    )
    for models, copies, shards in halves:
        for parameter, copy, shard in zip(models, copies, shards, strict=True):
            yield Master(shard if copy is None else copy, parameter, _start(leaf, parameter))
    for models, shards in zip(leaf.model_fp32_groups, leaf.shard_fp32_groups, strict=True):
        for parameter, shard in zip(models, shards, strict=True):
            yield Master(shard, parameter, _start(leaf, parameter))


def _start(leaf: Any, parameter: torch.nn.Parameter) -> int:
    # Groups and buffers order their parameters differently, so the range is looked up by parameter.
    start: int = leaf._get_model_param_range_map(parameter)["param"].start
    return start
