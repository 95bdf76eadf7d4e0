"""What a logged step adds to a training step: norms, rates, and with them relative updates.

Usage: python -m benchmarks.logged_step [--models 60M 350M] [--step-ms 175] [--output FILE]

Needs a GPU, torch and triton. In one run and in turn, over the same tensors:

batched     the ranges of all matrices in one table of chunks, two launches
per matrix  one norm for every matrix

Figures are the median wall time from the call to the values on the CPU, on an idle GPU. "with
updates" adds the copy of the weights before the optimizer's step and the squared changes after it,
but not the step. "rows" is the time to write the row of every matrix to a CSV file, or its scalars
to TensorBoard, which does not depend on the GPU. Launches are those of kernels and of copies,
counted by torch.profiler. `--step-ms` is the time of a training step of the last model, for the
share that a log adds to it.
"""

import argparse
import functools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.environment import gpu_and_versions
from benchmarks.fused_step import share_of_rank
from benchmarks.optimizer_step import MODELS
from megatron_llr.output import replaced_file
from megatron_llr.param_groups.inner_groups import InnerGroups
from megatron_llr.param_groups.step_recorder import MatrixSums, StepRecorder
from megatron_llr.telemetry.csv_log import CsvLog
from megatron_llr.telemetry.observer import MatrixRates, Observer
from megatron_llr.telemetry.tables import text_table

_WAYS = {"batched": True, "per matrix": False}


class Still(torch.optim.Optimizer):
    """Steps nothing, so that only what surrounds a step is timed."""

    def __init__(self, groups: Any) -> None:
        super().__init__(groups, {"lr": 1e-3, "weight_decay": 0.1})

    def step(self, closure: Any = None) -> None:
        """Change no tensor."""


def launches(work: Callable[[], object]) -> int:
    """Kernels and copies that one call starts on the GPU."""
    work()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        work()
        torch.cuda.synchronize()
    events = profiled.events() or ()
    # The optimizer's own name is listed too.
    return sum(e.device_type == DeviceType.CUDA and "Optimizer." not in e.name for e in events)


def in_turn(works: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median wall milliseconds by name, after three rounds that do not count."""
    spent: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats + 3):
        for name, work in works.items():
            torch.cuda.synchronize()
            begun = time.perf_counter()
            work()
            torch.cuda.synchronize()
            spent[name].append(time.perf_counter() - begun)
    return {name: 1e3 * statistics.median(each[3:]) for name, each in spent.items()}


def observer(parts: Any, tensors: Any, *, batched: bool, updates: bool) -> Callable[[], Any]:
    """A logged step without the optimizer's own work, and everything up to values on the CPU."""
    optimizer = Still([{"params": tensors}])
    inner = InnerGroups(optimizer, parts, decoupled_decay=False, step="grouped")
    matrices = [matrix for _, ranges in parts.values() for matrix, _ in ranges]
    numel = [sum(b - a for a, b in runs) for _, ranges in parts.values() for _, runs in ranges]
    # The groups of a real step are not under test: one rate for all.
    inner._rates = [(group["lr"], group["params"]) for group in optimizer.param_groups]
    recorder = StepRecorder(
        [(inner, list(parts.values()))],
        matrices,
        tensors[0].device,
        updates=updates,
        batched=batched,
    )

    def observe() -> list[list[Any]]:
        recorder.arm(record=updates)
        if updates:
            optimizer.step()
        return list(MatrixSums(recorder.local_sums().table.cpu()).ratios(numel))

    return observe


def writers(folder: str, matrices: list[str]) -> dict[str, Callable[[], None]]:
    """What writes the values of a logged step, by name."""
    rates = {matrix: MatrixRates(2.0, 1e-3, 1e-4, 1e-3) for matrix in matrices}
    csv_only = Observer(say=print, csv_log=CsvLog(folder))
    csv_only.open(measured_up_to=0, rates_up_to=0)
    observers = {"rows, CSV": csv_only}
    if find_spec("tensorboard") is not None:
        from torch.utils.tensorboard import SummaryWriter

        observers["rows, TensorBoard"] = Observer(say=print, tensorboard=SummaryWriter(folder))
    return {name: functools.partial(each.stepped, 1, rates) for name, each in observers.items()}


def agreement(ways: dict[str, Callable[[], Any]]) -> float:
    """Largest relative difference of the norms between the ways."""
    norms = [torch.tensor(observe()[0], dtype=torch.float64) for observe in ways.values()]
    return float(((norms[0] - norms[1]) / norms[1]).abs().max())


def time_logs_of(name: str, repeats: int) -> dict[str, Any]:
    """Times and launches of one model, by way and by what is logged."""
    torch.cuda.empty_cache()
    tensors, parts = share_of_rank(*MODELS[name], "cuda")
    for tensor in tensors:
        tensor.normal_(std=0.02)
    works: dict[str, Callable[[], Any]] = {}
    for logged, updates in (("norms and rates", False), ("with updates", True)):
        for way, batched in _WAYS.items():
            key = f"{logged}, {way}"
            works[key] = observer(parts, tensors, batched=batched, updates=updates)
    matrices = [matrix for _, ranges in parts.values() for matrix, _ in ranges]
    first = {way: works[f"norms and rates, {way}"] for way in _WAYS}
    with tempfile.TemporaryDirectory() as folder:
        milliseconds = in_turn({**works, **writers(folder, matrices)}, repeats)
    return {
        "model": name,
        "elements": sum(tensor.numel() for tensor in tensors),
        "matrices": len(matrices),
        "milliseconds": milliseconds,
        "launches": {key: launches(work) for key, work in works.items()},
        "largest relative difference of norms": agreement(first),
    }


def main() -> None:
    """Measure, print a table, and write all figures where `--output` says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="*", choices=MODELS, default=["60M", "350M"])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--step-ms", type=float, default=175.0, help="of the last model")
    parser.add_argument("--output", type=Path, help="JSON file of all figures")
    given = parser.parse_args()
    head = gpu_and_versions(__file__)
    print(", ".join(f"{key} {value}" for key, value in head.items()))
    results = [time_logs_of(name, given.repeats) for name in given.models]
    for result in results:
        print(
            f"\n{result['model']}: {result['elements'] / 1e6:.0f}M elements, "
            f"{result['matrices']} matrices; norms differ by at most "
            f"{result['largest relative difference of norms']:.1e}"
        )
        times, counts = result["milliseconds"], result["launches"]
        rows = [(key, f"{ms:.3f}", str(counts.get(key, ""))) for key, ms in times.items()]
        print(text_table(("a logged step adds", "ms", "launches"), rows))
    last = results[-1]
    last["step, ms"] = given.step_ms
    last["logged over unlogged step"] = {
        key: 1 + ms / given.step_ms for key, ms in last["milliseconds"].items()
    }
    for key, ratio in last["logged over unlogged step"].items():
        print(f"{last['model']}, {key}: {ratio:.4f} of a step of {given.step_ms:g} ms")
    if given.output:
        with replaced_file(given.output) as partial:
            partial.write_text(json.dumps({**head, "models": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
