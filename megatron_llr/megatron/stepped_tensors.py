"""The tensors that Megatron's inner optimizers step, and the slice of a weight in each of them."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from megatron_llr.param_groups.hyperball_norms import SteppedDomain
from megatron_llr.param_groups.stepped_tensor import SteppedTensor


def leaf_optimizers(optimizer: Any) -> Iterator[Any]:
    """Megatron's wrappers that have an inner optimizer of their own, with chains flattened."""
    for child in getattr(optimizer, "chained_optimizers", [optimizer]):
        if child is not optimizer:
            yield from leaf_optimizers(child)
        elif not getattr(child, "is_stub_optimizer", False):
            yield child


def inner_optimizers(optimizer: Any) -> list[tuple[torch.optim.Optimizer, list[SteppedTensor]]]:
    """Every inner torch optimizer of this rank, with the tensors that it steps."""
    with_tensors = []
    for leaf in leaf_optimizers(optimizer):
        tensors = list(stepped_tensors_of(leaf))
        # Megatron's Muon splits a fused query, key and value weight, unless --muon-no-split-qkv.
        if getattr(leaf.optimizer, "split_qkv", False):
            is_qkv = leaf.optimizer.is_qkv_fn
            tensors = [replace(each, split=bool(is_qkv(each.tensor))) for each in tensors]
        with_tensors.append((leaf.optimizer, tensors))
    return with_tensors


def stepped_tensors_of(leaf: Any) -> Iterator[SteppedTensor]:
    """The tensors that one wrapper's inner optimizer steps.

    Distributed optimizer: fp32 shards (or shards of the model's own, with the precision-aware
    optimizer). Half precision without it: whole fp32 copies. Otherwise the parameters themselves.
    """
    if hasattr(leaf, "shard_fp32_from_float16_groups"):
        yield from _sharded(leaf)
    elif hasattr(leaf, "fp32_from_float16_groups"):
        for models, copies in zip(leaf.float16_groups, leaf.fp32_from_float16_groups, strict=True):
            for parameter, copy in zip(models, copies, strict=True):
                yield SteppedTensor(copy, parameter)
        for group in leaf.fp32_from_fp32_groups:
            for parameter in group:
                yield SteppedTensor(parameter, parameter)
    else:
        for group in leaf.optimizer.param_groups:
            for parameter in group["params"]:
                yield SteppedTensor(parameter, parameter)


def stepped_domains(optimizer: Any) -> list[SteppedDomain]:
    """The parameters of every inner optimizer, in the order of `inner_optimizers`."""
    domains = []
    for leaf in leaf_optimizers(optimizer):
        if hasattr(leaf, "shard_fp32_from_float16_groups"):
            # Its buffers name all parameters; its groups those of which this rank has a slice.
            parameters = [p for buffer in leaf.buffers for p in buffer.params]
            group = leaf.data_parallel_group
        else:
            parameters, group = [each.parameter for each in stepped_tensors_of(leaf)], None
        domains.append(SteppedDomain(parameters, group, partial(_peak_rate, leaf.config)))
    return domains


def _peak_rate(config: Any, group: Mapping[str, Any]) -> float:
    peak = group.get("max_lr")
    return float(config.lr if peak is None else peak)


def _sharded(leaf: Any) -> Iterator[SteppedTensor]:
    halves = zip(
        leaf.model_float16_groups,
        leaf.shard_fp32_from_float16_groups,
        leaf.shard_float16_groups,
        strict=True,
    )
    for models, copies, shards in halves:
        for parameter, copy, shard in zip(models, copies, shards, strict=True):
            yield SteppedTensor(shard if copy is None else copy, parameter, _start(leaf, parameter))
    for models, shards in zip(leaf.model_fp32_groups, leaf.shard_fp32_groups, strict=True):
        for parameter, shard in zip(models, shards, strict=True):
            yield SteppedTensor(shard, parameter, _start(leaf, parameter))


def _start(leaf: Any, parameter: torch.nn.Parameter) -> int:
    # Groups and buffers order their parameters differently, so the range is looked up by parameter.
    start: int = leaf._get_model_param_range_map(parameter)["param"].start
    return start
