"""The inner optimizer's step with a learning rate per matrix, and its steps with one rate.

Usage: python -m benchmarks.optimizer_step [--models 60M 350M] [--output FILE]

Needs a GPU, torch and triton. In one run and in turn, over the same tensors:

fused, a rate per matrix    layer groups, one launch (`--llr-step fused`)
groups, a rate per matrix   layer groups as param groups (`--llr-step grouped`)
torch fused, torch foreach  torch's AdamW with one learning rate
TE FusedAdam                Transformer Engine's, with one learning rate, where it is installed
floor                       28 bytes an element at the copy bandwidth measured in the same run

Figures are the median wall time of `optimizer.step()` up to the end of its work on the GPU. Those
called "CUDA events" are taken over many steps in a row; the ratios are theirs.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import gpu_and_versions
from benchmarks.fused_step import share_of_rank
from megatron_llr.output import replaced_file
from megatron_llr.param_groups.inner_groups import InnerGroups
from megatron_llr.telemetry.tables import text_table

MODELS = {
    "60M": (6, 768, 1512, 12),
    "350M": (24, 1024, 2736, 16),
    "1B": (24, 2048, 5461, 32),
    "3B/2": (16, 2560, 6848, 32),
}
_SETTINGS = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
_BYTES = 28


def milliseconds(work: Callable[[], object], repeats: int) -> float:
    """Median wall time, after three calls that do not count."""
    spent = []
    for _ in range(repeats + 3):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        work()
        torch.cuda.synchronize()
        spent.append(time.perf_counter() - begun)
    return 1e3 * statistics.median(spent[3:])


def cpu_milliseconds(work: Callable[[], object], repeats: int) -> float:
    """Median time until `work` returns, whatever the GPU still does."""
    spent = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        work()
        spent.append(time.perf_counter() - begun)
    return 1e3 * statistics.median(spent)


def device_milliseconds(work: Callable[[], object], repeats: int) -> float:
    """Time of a call by CUDA events over many calls in a row, as a training loop makes them."""
    begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    work()
    begun.record()
    for _ in range(repeats):
        work()
    ended.record()
    torch.cuda.synchronize()
    return begun.elapsed_time(ended) / repeats


def optimizers(adamw: str) -> dict[str, Callable[[Any], Any]]:
    """What the layer groups are built on, by name."""
    if adamw == "torch":
        return {
            "torch fused": lambda groups: torch.optim.AdamW(groups, fused=True, **_SETTINGS),
            "torch foreach": lambda groups: torch.optim.AdamW(groups, foreach=True, **_SETTINGS),
        }
    from transformer_engine.pytorch.optimizers import FusedAdam

    return {"TE FusedAdam": lambda groups: FusedAdam(groups, **_SETTINGS)}


def time_steps_of(name: str, repeats: int, adamw: str) -> dict[str, Any]:
    """Times of one model in milliseconds, by way of stepping."""
    torch.cuda.empty_cache()
    tensors, parts = share_of_rank(*MODELS[name], "cuda")
    for tensor in tensors:
        tensor.grad = torch.randn_like(tensor).mul_(1e-3)
    matrices = [matrix for _, ranges in parts.values() for matrix, _ in ranges]
    multipliers = {matrix: 1 + index / 100 for index, matrix in enumerate(matrices)}
    elements = sum(tensor.numel() for tensor in tensors)
    times: dict[str, float] = {}
    for kind, build in optimizers(adamw).items():
        plain = build([{"params": tensors}])
        times[f"{kind}, one rate"] = milliseconds(plain.step, repeats)
        times[f"{kind}, CUDA events"] = device_milliseconds(plain.step, repeats)
        del plain
    first, build = next(iter(optimizers(adamw).items()))
    for way in ("fused", "grouped"):
        optimizer = build([{"params": tensors}])
        groups = InnerGroups(optimizer, parts, decoupled_decay=False, step=way)
        groups.multipliers = multipliers
        times[f"{way} on {first}, a rate per matrix"] = milliseconds(optimizer.step, repeats)
        if way == "fused":
            times["fused, time on the CPU"] = cpu_milliseconds(optimizer.step, repeats)
            times["fused, CUDA events"] = device_milliseconds(optimizer.step, repeats)
        del optimizer, groups
    source = torch.empty(elements // 2, device="cuda")
    target = torch.empty_like(source)
    copy = milliseconds(lambda: target.copy_(source), repeats)
    bandwidth = elements * 4 / copy
    times["floor"] = elements * _BYTES / bandwidth
    fused = times["fused, CUDA events"]
    return {
        "model": name,
        "elements": elements,
        "matrices": len(matrices),
        "optimizer": first,
        "copy bandwidth, TB/s": bandwidth / 1e9,
        "milliseconds": times,
        "fused over the optimizer with one rate": fused / times[f"{first}, CUDA events"],
        "fused over floor": fused / times["floor"],
    }


def main() -> None:
    """Measure, print a table, and write all figures where `--output` says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="*", choices=MODELS, default=list(MODELS))
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--optimizer", choices=("torch", "te"), default="torch")
    parser.add_argument("--output", type=Path, help="JSON file of all figures")
    given = parser.parse_args()
    head = gpu_and_versions(__file__)
    results = [time_steps_of(name, given.repeats, given.optimizer) for name in given.models]
    print(", ".join(f"{key} {value}" for key, value in head.items()))
    for result in results:
        print(
            f"\n{result['model']}: {result['elements'] / 1e6:.0f}M elements, "
            f"{result['matrices']} matrices, copies at {result['copy bandwidth, TB/s']:.2f} TB/s"
        )
        rows = [(way, f"{value:.2f}") for way, value in result["milliseconds"].items()]
        print(text_table(("step", "ms"), rows))
        for ratio in ("fused over the optimizer with one rate", "fused over floor"):
            print(f"{ratio}: {result[ratio]:.3f}")
    if given.output:
        with replaced_file(given.output) as partial:
            partial.write_text(json.dumps({**head, "models": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
