"""Collectives over parts of unequal size, which NCCL has and gloo lacks.

The alltoall dispatcher of experts needs them under expert tensor parallelism.
"""

import functools
from typing import Any

import torch
import torch.distributed as dist


def substitute() -> None:
    """Let torch.distributed take parts of unequal size on gloo; equal ones go the usual way."""
    module: Any = dist
    module.all_gather = _all_gather(dist.all_gather)
    module.reduce_scatter = _reduce_scatter(dist.reduce_scatter)


def _unequal(parts: list[torch.Tensor]) -> bool:
    return len({part.shape for part in parts}) > 1


def _all_gather(plain: Any) -> Any:
    @functools.wraps(plain)
    def all_gather(
        tensor_list: list[torch.Tensor],
        tensor: torch.Tensor,
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        # Every member sees the same list, so that all go the same way.
        if async_op or not _unequal(tensor_list):
            return plain(tensor_list, tensor, group, async_op)
        tensor_list[dist.get_rank(group)].copy_(tensor)
        for member, part in enumerate(tensor_list):
            dist.broadcast(part, group=group, group_src=member)
        return None

    return all_gather


def _reduce_scatter(plain: Any) -> Any:
    @functools.wraps(plain)
    def reduce_scatter(
        output: torch.Tensor,
        input_list: list[torch.Tensor],
        op: Any = dist.ReduceOp.SUM,
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        if async_op or not _unequal(input_list):
            return plain(output, input_list, op, group, async_op)
        whole = torch.cat([part.reshape(-1) for part in input_list])
        dist.all_reduce(whole, op, group=group)
        mine = whole.split([part.numel() for part in input_list])[dist.get_rank(group)]
        output.copy_(mine.view_as(output))
        return None

    return reduce_scatter
