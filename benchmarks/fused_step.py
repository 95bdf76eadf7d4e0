"""Cost of one learning rate per projection: the inner step with `projection` over `parameter`.

Usage: python benchmarks/fused_step.py [--blocks 24] [--hidden 2048] [--ffn 5461] [--heads 32]

One rank's share of the paper's 1B model (24 blocks, hidden 2048, 32 heads: 2,304 segments of q, k
and v, 48 of gate and up) under GroupStepAdamW, the CPU route's optimizer. The two granularities
alternate, step by step, on the same tensors. Prints the ratio of the medians, the overhead per
segment and the memory of the views. The full size needs about 15 GB.
"""

import argparse
import statistics
import time
import tracemalloc

import torch

from megatron_llr.cpu.adam import GroupStepAdamW
from megatron_llr.matrices.layout import flat_ranges, interleaved, stacked
from megatron_llr.param_groups.inner_groups import InnerGroups
from megatron_llr.param_groups.stepped_tensor import MatrixRanges, SteppedTensor


def parts_of(
    tensor: torch.Tensor, spans: dict[str, tuple[object, ...]], block: int
) -> list[MatrixRanges]:
    """The matrices of one fused tensor."""
    rows, columns = tensor.shape
    return [
        (f"block.{block}.{role}", flat_ranges(runs, columns, 0, rows * columns))  # type: ignore[arg-type]
        for role, runs in spans.items()
    ]


def memory_of_views(groups: InnerGroups, apart: dict[str, float]) -> int:
    """Bytes of Python objects that the views take; their tensors share memory with the weights."""
    groups.grouped.views.clear()
    groups.multipliers = apart
    tracemalloc.start()
    groups.optimizer.step()
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return kept


def share_of_rank(
    blocks: int, hidden: int, ffn: int, heads: int, device: str = "cpu"
) -> tuple[list[torch.Tensor], dict[int, tuple[SteppedTensor, tuple[MatrixRanges, ...]]]]:
    """The tensors that a rank's optimizer steps, with gradients, and the matrices in each."""
    channels = hidden // heads
    shapes = {"qkv": (3 * hidden, hidden), "o": (hidden, hidden)}
    shapes |= {"fc1": (2 * ffn, hidden), "down": (hidden, ffn)}
    # Gradients are only read: one per shape serves all blocks.
    gradients = {name: torch.full(shape, 1e-3, device=device) for name, shape in shapes.items()}
    layouts = {
        "qkv": interleaved([(role, channels) for role in "qkv"], heads, 0, 3 * hidden),
        "fc1": stacked(("gate", "up"), 2 * ffn, 0),
    }
    tensors: list[torch.Tensor] = []
    parts: dict[int, tuple[SteppedTensor, tuple[MatrixRanges, ...]]] = {}
    for block in range(blocks):
        for name, shape in shapes.items():
            tensor = torch.full(shape, 0.01, device=device)
            tensor.grad = gradients[name]
            spans = layouts.get(name, stacked((name,), shape[0], 0))
            master = SteppedTensor(tensor, tensor)  # type: ignore[arg-type]
            parts[id(tensor)] = (master, tuple(parts_of(tensor, spans, block)))
            tensors.append(tensor)
    return tensors, parts


def multipliers_of(groups: InnerGroups) -> dict[str, dict[str, float]]:
    """Granularity -> multipliers that differ between all that it keeps apart."""
    tensors = [ranges for _, ranges in groups.parts.values()]
    matrices = [matrix for ranges in tensors for matrix, _ in ranges]
    return {
        "projection": {matrix: 1 + index / 1000 for index, matrix in enumerate(matrices)},
        "parameter": {
            matrix: 1 + index / 1000 for index, ranges in enumerate(tensors) for matrix, _ in ranges
        },
    }


def time_in_turn(groups: InnerGroups, steps: int) -> dict[str, float]:
    """Median seconds of the optimizer's step with each granularity, step by step in turn."""
    multipliers = multipliers_of(groups)
    on_gpu = any(tensor.is_cuda for tensor in groups.optimizer.param_groups[0]["params"])
    wait = torch.cuda.synchronize if on_gpu else lambda: None
    spent: dict[str, list[float]] = {name: [] for name in multipliers}
    for _ in range(steps + 1):
        for name, by_matrix in multipliers.items():
            groups.multipliers = by_matrix
            wait()
            begun = time.perf_counter()
            groups.optimizer.step()
            wait()
            spent[name].append(time.perf_counter() - begun)
    return {name: statistics.median(each[1:]) for name, each in spent.items()}


def main() -> None:
    """Build the share, then time both granularities alternately."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("blocks", 24), ("hidden", 2048), ("ffn", 5461), ("heads", 32)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--steps", type=int, default=6, help="timed steps of each granularity")
    given = parser.parse_args()
    tensors, parts = share_of_rank(given.blocks, given.hidden, given.ffn, given.heads)
    optimizer = GroupStepAdamW([{"params": tensors, "weight_decay": 0.1}])
    groups = InnerGroups(optimizer, parts, decoupled_decay=False)
    seconds = time_in_turn(groups, given.steps)
    kept = memory_of_views(groups, multipliers_of(groups)["projection"])
    fused = [ranges for _, ranges in parts.values() if len(ranges) > 1]
    segments = sum(len(runs) for ranges in fused for _, runs in ranges)
    added = seconds["projection"] - seconds["parameter"]
    elements = sum(tensor.numel() for tensor in tensors)
    print(
        f"{elements / 1e9:.2f}e9 elements, {segments} segments, {torch.get_num_threads()} threads"
    )
    for name, median in seconds.items():
        print(f"{name:>10}: {1000 * median:.1f} ms a step")
    print(f"ratio {seconds['projection'] / seconds['parameter']:.3f}")
    print(f"overhead per segment {1e6 * added / segments:.1f} us")
    print(f"views kept between steps: {kept / 2**20:.1f} MiB of Python objects, no tensor memory")


if __name__ == "__main__":
    main()
