"""The inner optimizer's step with hyperball steps of all matrices, and its plain step.

Usage: python -m benchmarks.hyperball_step [--models 60M 350M] [--output FILE]

Needs a GPU, torch and triton. In one run, over the same tensors:

hyperball       the way that `--llr-step auto` takes (two launches, sums, a few operations on sums)
grouped         `--llr-step grouped`: the optimizer's own step, then sums and projection
plain           torch's fused AdamW with one learning rate
floor           the bytes that a step must move, at the copy bandwidth measured in the same run

Times are those of a call by CUDA events over many calls in a row. Per element with fp32 gradients,
a plain step reads weight, gradient and two moments, and writes weight and moments: 28 bytes. A
hyperball step knows the new weights only when all directions are summed: it reads the four and
writes the moments, then reads weight and moments again and writes the weight: 40 bytes.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import gpu_and_versions
from benchmarks.optimizer_step import MODELS, device_milliseconds, optimizers
from megatron_llr.matrices.ids import MatrixId
from megatron_llr.matrices.layout import Placement, interleaved, stacked
from megatron_llr.matrices.shard import MatrixShard
from megatron_llr.output import replaced_file
from megatron_llr.param_groups.hyperball_norms import SteppedDomain
from megatron_llr.param_groups.layer_groups import LayerGroups
from megatron_llr.param_groups.stepped_tensor import SteppedTensor
from megatron_llr.telemetry.tables import text_table

_BYTES = 40
_ETA = 0.01


def shards_of(blocks: int, hidden: int, ffn: int, heads: int, device: str) -> list[MatrixShard]:
    """The matrices of some blocks in fused parameters, with random weights and gradients."""
    channels = hidden // heads
    qkv = interleaved([(role, channels) for role in "qkv"], heads, 0, 3 * hidden)
    kinds = (
        ("attention", hidden, qkv, 3 * hidden),
        ("attention", hidden, stacked(("o",), hidden, 0), hidden),
        ("mlp", hidden, stacked(("gate", "up"), 2 * ffn, 0), 2 * ffn),
        ("mlp", ffn, stacked(("down",), hidden, 0), hidden),
    )
    shards = []
    for block in range(blocks):
        for module, columns, spans_of, rows in kinds:
            weight = torch.randn(rows, columns, device=device).mul_(0.02)
            parameter = torch.nn.Parameter(weight)
            parameter.grad = torch.randn_like(weight).mul_(1e-3)
            for role, spans in spans_of.items():
                matrix = MatrixId(role, container=f"block.{block}", module=module)
                placement = Placement(spans, 0, columns)
                shards.append(
                    MatrixShard(
                        matrix,
                        str(matrix),
                        parameter,
                        placement.rows,
                        columns,
                        (placement,),
                        (0,),
                        None,
                        initializer=lambda _: torch.nn.init.zeros_,
                    )
                )
    return shards


def _with_hyperball(
    build: Callable[[Any], Any], shards: list[MatrixShard], step: str
) -> torch.optim.Optimizer:
    """An optimizer of the shards whose matrices have hyperball steps at rates of their own."""
    parameters = list({id(shard.parameter): shard.parameter for shard in shards}.values())
    optimizer: torch.optim.Optimizer = build([{"params": parameters}])
    domain = SteppedDomain(parameters, None, lambda group: float(group["lr"]))
    stepped = [SteppedTensor(parameter, parameter) for parameter in parameters]
    groups = LayerGroups([(optimizer, stepped)], shards, step=step, domains=[domain])
    groups.start_hyperball(groups.norms(shards), _ETA)
    groups.set_multipliers({shard.matrix: 1 + index / 1000 for index, shard in enumerate(shards)})
    return optimizer


def _milliseconds(work: Callable[[], object], repeats: int, device: str) -> float:
    work()
    if device == "cuda":
        return device_milliseconds(work, repeats)
    begun = time.perf_counter()
    for _ in range(repeats):
        work()
    return 1e3 * (time.perf_counter() - begun) / repeats


def time_hyperball_steps_of(
    shape: tuple[int, int, int, int], repeats: int, device: str
) -> dict[str, Any]:
    """Times of one model in milliseconds.

    Args:
        shape: blocks, hidden, ffn, heads.
        repeats: timed steps.
        device: cuda; on cpu, where the grouped way is taken, the figures mean nothing.
    """
    shards = shards_of(*shape, device)
    parameters = list({id(shard.parameter): shard.parameter for shard in shards}.values())
    build = optimizers("torch")["torch fused"]
    times: dict[str, float] = {}
    plain = build([{"params": parameters}])
    times["plain AdamW"] = _milliseconds(plain.step, repeats, device)
    del plain
    for name, step in (("hyperball", "auto"), ("hyperball, grouped", "grouped")):
        optimizer = _with_hyperball(build, shards, step)
        times[name] = _milliseconds(optimizer.step, repeats, device)
        del optimizer
    elements = sum(parameter.numel() for parameter in parameters)
    source = torch.empty(elements // 2, device=device)
    target = torch.empty_like(source)
    copy = _milliseconds(lambda: target.copy_(source), repeats, device)
    times["floor"] = copy * _BYTES / 4
    return {
        "elements": elements,
        "matrices": len(shards),
        "bytes an element": _BYTES,
        "milliseconds": times,
        "hyperball over floor": times["hyperball"] / times["floor"],
        "hyperball over plain AdamW": times["hyperball"] / times["plain AdamW"],
    }


def main() -> None:
    """Measure, print a table, and write all figures where `--output` says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="*", choices=MODELS, default=["60M", "350M"])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--output", type=Path, help="JSON file of all figures")
    given = parser.parse_args()
    head = gpu_and_versions(__file__)
    results = {
        name: time_hyperball_steps_of(MODELS[name], given.repeats, "cuda") for name in given.models
    }
    print(", ".join(f"{key} {value}" for key, value in head.items()))
    for name, result in results.items():
        print(f"\n{name}: {result['elements'] / 1e6:.0f}M elements, {result['matrices']} matrices")
        rows = [(way, f"{value:.3f}") for way, value in result["milliseconds"].items()]
        print(text_table(("step", "ms"), rows))
        for ratio in ("hyperball over floor", "hyperball over plain AdamW"):
            print(f"{ratio}: {result[ratio]:.3f}")
    if given.output:
        with replaced_file(given.output) as partial:
            partial.write_text(json.dumps({**head, "models": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
