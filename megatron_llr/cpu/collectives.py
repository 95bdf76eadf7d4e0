"""Gloo in place of NCCL: tensors of unequal size, and one network thread for all groups.

The alltoall dispatcher of experts needs collectives over tensors of unequal size with expert tensor
parallelism.
"""

import functools
import os
from typing import Any

import torch
import torch.distributed as dist


def substitute() -> None:
    """Adapt gloo to Megatron's many groups and to its tensors of unequal size."""
    _share_device()
    _support_unequal_sizes()


def _share_device() -> None:
    """Give all groups of a process one gloo device.

    Otherwise each of Megatron's groups has its own, with a thread that wakes up 100 times a second:
    a third of the CPU time of a small job on two ranks.
    """
    gloo: Any = dist.ProcessGroupGloo
    create = gloo.__init__

    @functools.cache
    def device(process: int) -> Any:  # threads do not survive a fork
        return gloo.create_default_device()

    @functools.wraps(create)
    def initialize(group: Any, *arguments: Any, **settings: Any) -> None:
        # torch.distributed gives a timeout alone. Explicit options name their own devices.
        if "timeout" in settings:
            options = gloo._Options()
            options._timeout = settings.pop("timeout")
            options._devices = [device(os.getpid())]
            settings["options"] = options
        create(group, *arguments, **settings)

    gloo.__init__ = initialize


def _support_unequal_sizes() -> None:
    module: Any = dist
    equal_all_gather, equal_reduce_scatter = dist.all_gather, dist.reduce_scatter

    @functools.wraps(equal_all_gather)
    def all_gather(
        tensor_list: list[torch.Tensor],
        tensor: torch.Tensor,
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        # Every rank has the same list, so all ranks take the same branch.
        if async_op or not _unequal(tensor_list):
            return equal_all_gather(tensor_list, tensor, group, async_op)
        tensor_list[dist.get_rank(group)].copy_(tensor)
        for member, part in enumerate(tensor_list):
            dist.broadcast(part, group=group, group_src=member)
        return None

    @functools.wraps(equal_reduce_scatter)
    def reduce_scatter(
        output: torch.Tensor,
        input_list: list[torch.Tensor],
        op: Any = dist.ReduceOp.SUM,
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        if async_op or not _unequal(input_list):
            return equal_reduce_scatter(output, input_list, op, group, async_op)
        whole = torch.cat([part.reshape(-1) for part in input_list])
        dist.all_reduce(whole, op, group=group)
        mine = whole.split([part.numel() for part in input_list])[dist.get_rank(group)]
        output.copy_(mine.view_as(output))
        return None

    module.all_gather, module.reduce_scatter = all_gather, reduce_scatter


def _unequal(parts: list[torch.Tensor]) -> bool:
    return len({part.shape for part in parts}) > 1
