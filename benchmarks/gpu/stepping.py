"""The optimizers that are installed: which views each takes, and what they cost."""

import importlib
import itertools
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from benchmarks.fused_step import share_of_rank, time_in_turn
from megatron_llr.matrices.ids import MatrixId
from megatron_llr.param_groups.inner_groups import InnerGroups
from megatron_llr.param_groups.probe import stepping
from megatron_llr.param_groups.stepped_tensor import SteppedTensor, TensorMatrices

_SETTINGS = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def _optimizers(device: str) -> dict[str, Callable[[Any], Any] | str]:
    """Name -> what builds it, or why it cannot be built."""

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
        except Exception as missing:  # half-installed packages fail in ways of their own
            optimizers[name] = f"not importable: {missing}"
            continue
        optimizers[name] = lambda groups, kind=kind: kind(groups, adam_w_mode=True, **_SETTINGS)
    return optimizers


def compare(
    device: str,
    *,
    blocks: int = 24,
    hidden: int = 1024,
    ffn: int = 2736,
    heads: int = 16,
    steps: int = 10,
) -> dict[str, Any]:
    """Probe every optimizer; where it takes views, time a rate per matrix over one per parameter.

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


def many_experts(
    device: str,
    *,
    blocks: int = 11,
    experts: int = 128,
    hidden: int = 64,
    ffn: int = 96,
    steps: int = 10,
) -> dict[str, Any]:
    """Time steps with a rate per expert matrix over the optimizer's own, in turn.

    Args:
        device: cuda or cpu.
        blocks: blocks of the model.
        experts: experts of each block; an expert has a fused gate and up, and a down projection.
        hidden: width of the model.
        ffn: width of an expert.
        steps: timed steps of each.
    """
    timed: dict[str, Any] = {}
    matrices = 3 * blocks * experts
    for name, build in _optimizers(device).items():
        if isinstance(build, str):
            timed[name] = {"skipped": build}
            continue
        tensors, parts = _expert_tensors(blocks, experts, hidden, ffn, device)
        optimizer = build([{"params": tensors}])
        groups = InnerGroups(optimizer, parts, decoupled_decay=False)
        rates = {matrix: 1 + row / matrices for row, matrix in enumerate(groups.matrices)}
        timed[name] = _time_with_and_without(groups, rates, steps)
        del optimizer, groups, tensors, parts
    return {"matrices": matrices, "optimizers": timed}


def _expert_tensors(
    blocks: int, experts: int, hidden: int, ffn: int, device: str
) -> tuple[list[torch.Tensor], dict[int, TensorMatrices]]:
    tensors: list[torch.Tensor] = []
    parts: dict[int, TensorMatrices] = {}
    for block, expert in itertools.product(range(blocks), range(experts)):
        half = ffn * hidden
        for shape, ranges in (
            ((2 * ffn, hidden), {"gate": (0, half), "up": (half, 2 * half)}),
            ((hidden, ffn), {"down": (0, half)}),
        ):
            tensor = torch.nn.Parameter(torch.full(shape, 0.01, device=device))
            tensor.grad = torch.full_like(tensor, 1e-3)
            ids = (
                (
                    MatrixId(role, container=f"block.{block}", module="mlp.expert", expert=expert),
                    run,
                )
                for role, run in ranges.items()
            )
            parts[id(tensor)] = (
                SteppedTensor(tensor, tensor),
                tuple((matrix, (run,)) for matrix, run in ids),
            )
            tensors.append(tensor)
    return tensors, parts


def _time_with_and_without(
    groups: InnerGroups, rates: Mapping[MatrixId, float], steps: int
) -> dict[str, float]:
    """Median seconds of a step at these rates, and of the optimizer's own."""
    on_gpu = groups.optimizer.param_groups[0]["params"][0].is_cuda
    wait = torch.cuda.synchronize if on_gpu else lambda: None
    seconds: dict[str, list[float]] = {"with": [], "without": []}
    for _ in range(steps + 2):
        for name, multipliers in (("with", rates), ("without", {})):
            groups.multipliers = multipliers
            wait()
            begun = time.perf_counter()
            groups.optimizer.step()
            wait()
            seconds[name].append(time.perf_counter() - begun)
    return {name: statistics.median(spent[2:]) for name, spent in seconds.items()}
