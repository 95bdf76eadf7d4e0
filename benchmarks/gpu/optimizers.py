"""The installed optimizers: which views each accepts, and what a rate per matrix costs."""

import importlib
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.fused_step import share_of_rank, time_in_turn
from megatron_llr.param_groups.inner_groups import InnerGroups
from megatron_llr.param_groups.probe import stepping

_SETTINGS = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def _optimizers(device: str) -> dict[str, Callable[[Any], Any] | str]:
    """Name -> function that builds it from param groups, or why it cannot be built."""

    def torch_adamw(**how: bool) -> Callable[[Any], Any]:
        return lambda groups: torch.optim.AdamW(groups, **_SETTINGS, **how)

    optimizers: dict[str, Callable[[Any], Any] | str] = {
        "torch AdamW": torch_adamw(),
        "torch AdamW, fused": torch_adamw(fused=True),
    }
    for name, module in (
        ("Transformer Engine FusedAdam", "transformer_engine.pytorch.optimizers"),
        ("apex FusedAdam", "apex.optimizers"),
    ):
        if device == "cpu":
            optimizers[name] = "its kernel needs a GPU"
            continue
        try:
            kind = importlib.import_module(module).FusedAdam
        except Exception as error:  # A partial installation can raise any error.
            optimizers[name] = f"not importable: {error}"
            continue
        optimizers[name] = lambda groups, kind=kind: kind(groups, adam_w_mode=True, **_SETTINGS)
    return optimizers


def probe_and_time(
    device: str,
    *,
    blocks: int = 24,
    hidden: int = 1024,
    ffn: int = 2736,
    heads: int = 16,
    steps: int = 10,
) -> dict[str, Any]:
    """Probe every optimizer; if it accepts views, time a rate per matrix and one per parameter.

    Args:
        device: cuda or cpu.
        blocks: blocks of the model, by default 350M's.
        hidden: its width.
        ffn: width inside its MLP.
        heads: its attention heads.
        steps: timed steps of each.
    """
    answers: dict[str, Any] = {}
    for name, build in _optimizers(device).items():
        if isinstance(build, str):
            answers[name] = {"skipped": build}
            continue
        tensors, parts = share_of_rank(blocks, hidden, ffn, heads, device)
        optimizer = build([{"params": tensors}])
        answers[name] = {"takes": stepping(optimizer)}
        if answers[name]["takes"] != "whole":
            groups = InnerGroups(optimizer, parts, decoupled_decay=False)
            answers[name]["seconds"] = time_in_turn(groups, steps)
        del optimizer, tensors, parts
    return answers
