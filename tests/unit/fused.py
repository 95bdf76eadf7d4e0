"""Shared by tests of layer groups: real torch optimizers, and a tensor of fused matrices."""

from collections.abc import Sequence
from typing import Any

import torch

from megatron_llr.cpu.adam import GroupStepAdamW
from megatron_llr.param_groups.inner_groups import InnerGroups
from megatron_llr.param_groups.stepped_tensor import SteppedTensor

SETTINGS = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
MULTIPLIERS = {"q": 1.5, "k": 5.0, "v": 0.25}
RANGES = {"q": [(0, 12), (24, 36)], "k": [(12, 18), (36, 42)], "v": [(18, 24), (42, 48)]}
OPTIMIZERS: dict[str, Any] = {
    "adamw": lambda groups: torch.optim.AdamW(groups, foreach=False, **SETTINGS),
    "adamw-foreach": lambda groups: torch.optim.AdamW(groups, foreach=True, **SETTINGS),
    "group-step": lambda groups: GroupStepAdamW(groups, **SETTINGS),
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.01, momentum=0.9, weight_decay=0.1),
}


class WatchedAdamW(torch.optim.AdamW):
    """Records the param groups in its own step: number of elements of every tensor in each."""

    def __init__(self, groups: Any) -> None:
        super().__init__(groups, foreach=False, **SETTINGS)
        self.seen: list[list[list[int]]] = []

    def step(self, closure: Any = None) -> Any:
        self.seen.append([[p.numel() for p in group["params"]] for group in self.param_groups])
        return super().step(closure)


def fused_groups(
    optimizer: torch.optim.Optimizer,
    tensor: torch.Tensor,
    ranges: dict[str, Sequence[tuple[int, int]]],
    *,
    decoupled_decay: bool = False,
) -> InnerGroups:
    """Layer groups of one fused tensor."""
    parts = tuple((matrix, tuple(runs)) for matrix, runs in ranges.items())
    stepped = SteppedTensor(tensor, torch.nn.Parameter(tensor))
    groups = InnerGroups(optimizer, {id(tensor): (stepped, parts)}, decoupled_decay=decoupled_decay)
    groups.multipliers = MULTIPLIERS
    return groups
