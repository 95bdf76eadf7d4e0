"""Stands for the GPU package mamba-ssm: its norm, in plain torch."""

from typing import Any

import torch


class RMSNorm(torch.nn.Module):
    """Root mean square norm over groups of `group_size` channels; Megatron passes it no gate."""

    def __init__(
        self,
        hidden_size: int,
        eps: float,
        group_size: int,
        norm_before_gate: bool,
        device: Any,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.eps, self.group_size = eps, group_size
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=dtype, device="cpu"))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        groups = hidden.float().unflatten(-1, (-1, self.group_size))
        scaled = groups * torch.rsqrt(groups.square().mean(-1, keepdim=True) + self.eps)
        return (scaled.flatten(-2) * self.weight.float()).to(hidden.dtype)
