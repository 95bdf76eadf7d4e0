"""What a measurement of all block matrices costs on one GPU, next to two other ways, in one run.

Usage: python benchmarks/measurement.py [--models 60M 350M] [--output FILE]

Needs only torch. Three ways to the spectra of the same random matrices:

batched     as a measurement computes them: matrices of equal smaller side in stacks, with records
one by one  a Gram matrix and its eigenvalues for each matrix, with records
svdvals     torch.linalg.svdvals of each matrix in fp32, the loop of the authors' code; values only

Where it says so, the last two are timed on one block and multiplied by the number of blocks.
"""

import argparse
import json
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_llr.output import replaced_file
from megatron_llr.spectrum import cusolver, record_from_eigenvalues, records_from_eigenvalues
from megatron_llr.spectrum.batched import (
    batch_size,
    eigenvalues_in_batches,
    gram_dtype,
    memory_of,
    solve_grams,
)
from megatron_llr.spectrum.eigenvalues import eigenvalues_of, full_precision
from megatron_llr.spectrum.record import SpectrumRecord
from megatron_llr.telemetry.tables import text_table


@dataclass(frozen=True)
class Model:
    """Block matrices of a LLaMA model: q, k, v, o, gate, up, down in each block."""

    blocks: int
    hidden: int
    ffn: int
    timed_blocks: int = 0
    """Blocks on which the slow ways are timed; all if 0."""

    def block(self, dtype: torch.dtype, device: str, seed: int) -> list[torch.Tensor]:
        """Random weights of one block, [rows, columns] each."""
        generator = torch.Generator(device).manual_seed(seed)
        h, f = self.hidden, self.ffn
        shapes = [(h, h)] * 4 + [(f, h)] * 2 + [(h, f)]
        return [
            torch.randn(s, generator=generator, device=device).mul_(0.02).to(dtype) for s in shapes
        ]


MODELS = {
    "tiny": Model(2, 128, 320),
    "60M": Model(6, 768, 1512),
    "350M": Model(24, 1024, 2736),
    "1B": Model(24, 2048, 5461, timed_blocks=1),
    "3B": Model(32, 2560, 6848, timed_blocks=1),
}
SIZES = (512, 768, 1024, 2048, 2560, 4096)
BATCHES = (1, 2, 4, 8, 16, 32, 64)
# Bytes that the stacks of the table of sizes may take with the solver's workspace.
TABLE_MEMORY = 16e9


def seconds(work: Callable[[], object], device: str) -> float:
    """Wall time of `work`, to the end of what it started on the device."""
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def records_in_batches(weights: list[torch.Tensor], memory: float) -> list[SpectrumRecord]:
    """Records as a measurement computes them; all spectra here have one length."""
    spectra = eigenvalues_in_batches(weights, memory=memory)
    methods = [method for _, method in spectra]
    return records_from_eigenvalues([values for values, _ in spectra], methods=methods)


def records_one_by_one(weights: list[torch.Tensor]) -> list[SpectrumRecord]:
    """Records from one solver call for each matrix."""
    return [
        record_from_eigenvalues(values, method=method)
        for values, method in map(eigenvalues_of, weights)
    ]


def singular_values(weights: list[torch.Tensor]) -> None:
    """The loop of the authors' code: singular values of each matrix in fp32."""
    for weight in weights:
        torch.linalg.svdvals(weight.float())


def gram_products(weights: list[torch.Tensor], dtype: torch.dtype) -> None:
    """Only the Gram matrices, into memory allocated once."""
    size = min(weights[0].shape)
    gram = torch.empty(size, size, dtype=dtype, device=weights[0].device)
    with full_precision():
        for weight in weights:
            matrix = weight.to(dtype)
            matrix = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
            torch.mm(matrix, matrix.T, out=gram)


def worst_difference(some: list[SpectrumRecord], others: list[SpectrumRecord]) -> float:
    """Largest relative difference of two lists of exponents."""
    return max(
        abs(a.alpha_hill_median / b.alpha_hill_median - 1)
        for a, b in zip(some, others, strict=True)
    )


def measure_model(
    name: str, *, device: str, dtype: torch.dtype, memory: float, repeats: int
) -> dict[str, Any]:
    """Times of one model, and the difference between the two ways of this package.

    Args:
        name: a key of `MODELS`.
        device: cuda or cpu.
        dtype: of the weights.
        memory: bytes for a batch.
        repeats: the batched time is the median of this many.
    """
    model = MODELS[name]
    weights = [
        weight for block in range(model.blocks) for weight in model.block(dtype, device, block)
    ]
    size, per_block = min(weights[0].shape), len(weights) // model.blocks
    few = model.timed_blocks or model.blocks
    scale = model.blocks / few
    part = weights[: few * per_block]

    records_one_by_one(part[:per_block])
    batched_records = records_in_batches(weights, memory)
    batched = statistics.median(
        seconds(lambda: records_in_batches(weights, memory), device) for _ in range(repeats)
    )
    single: list[SpectrumRecord] = []
    one_by_one = scale * seconds(lambda: single.extend(records_one_by_one(part)), device)
    torch.linalg.svdvals(part[0].float())
    svdvals = scale * seconds(lambda: singular_values(part), device)
    kind = gram_dtype(size, full=False)
    gram_products(part[:per_block], kind)
    products = seconds(lambda: gram_products(weights, kind), device)
    return {
        "model": name,
        "matrices": len(weights),
        "eigenvalues": size,
        "batch": batch_size(size, len(weights), kind, memory, device),
        "blocks_timed_one_by_one": few,
        "blocks": model.blocks,
        "batched_s": batched,
        "one_by_one_s": one_by_one,
        "svdvals_s": svdvals,
        "gram_products_s": products,
        "worst_relative_difference_of_exponents": worst_difference(
            batched_records[: len(part)], single
        ),
        "methods": sorted({record.method for record in batched_records}),
    }


def measure_size(size: int, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Milliseconds of the solver per matrix, for every batch size that fits."""
    dtype, device = gram_dtype(size, full=False), arguments.device
    rows = []
    for count in arguments.batches:
        if count * memory_of(size, dtype) > TABLE_MEMORY:
            continue
        generator = torch.Generator(device).manual_seed(0)
        weight = torch.randn(size, 2 * size, generator=generator, device=device)
        with full_precision():
            gram = (weight @ weight.T).to(dtype).expand(count, size, size)

        def solve(stack: torch.Tensor) -> None:
            # A single matrix is solved by torch, as a measurement does.
            if len(stack) == 1:
                torch.linalg.eigvalsh(stack[0])
            else:
                solve_grams(stack)

        times = []
        for _ in range(arguments.repeats):
            # The solver may overwrite its stack; the copy is not part of the time.
            stack = gram.contiguous().clone()
            times.append(seconds(lambda stack=stack: solve(stack), device))  # type: ignore[misc]
        # The first call is a warm-up.
        rows.append({"size": size, "batch": count, "ms": 1e3 * min(times[1:] or times) / count})
    return rows


def card_and_versions(device: str) -> dict[str, Any]:
    """Card, versions and commit."""
    on_gpu = device == "cuda"
    loaded = cusolver.cusolver_library() if on_gpu else None
    direct = on_gpu and not cusolver.torch_solves_batches() and loaded is not None
    try:
        root = Path(__file__).resolve().parents[1]
        command = ["git", "-C", str(root), "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None
    return {
        "card": torch.cuda.get_device_name() if on_gpu else "CPU",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cusolver": cusolver.library_version(loaded) if loaded else None,
        "solver": "cusolverDnXsyevBatched, called directly" if direct else "torch.linalg.eigvalsh",
        "commit": commit,
    }


def print_models(rows: list[dict[str, Any]]) -> None:
    """Seconds and ratios of every model."""
    head = "model matrices N batch batched/s one/s svdvals/s one/batched svdvals/batched".split()
    text = []
    for row in rows:
        batched = row["batched_s"]
        scaled = "*" if row["blocks_timed_one_by_one"] < row["blocks"] else ""
        text.append(
            (
                row["model"],
                str(row["matrices"]),
                str(row["eigenvalues"]),
                str(row["batch"]),
                f"{batched:.3f}",
                f"{row['one_by_one_s']:.3f}{scaled}",
                f"{row['svdvals_s']:.2f}{scaled}",
                f"{row['one_by_one_s'] / batched:.2f}",
                f"{row['svdvals_s'] / batched:.1f}",
                f"{row['gram_products_s'] / batched:.0%}",
                f"{row['worst_relative_difference_of_exponents']:.1e}",
            )
        )
    print(text_table((*head, "products", "alpha differs"), text))
    print("* timed on one block, times the number of blocks\n")


def print_sizes(rows: list[dict[str, Any]], batches: list[int]) -> None:
    """Milliseconds a matrix, a line for every size."""
    cells = {(row["size"], row["batch"]): f"{row['ms']:.2f}" for row in rows}
    sizes = sorted({size for size, _ in cells})
    lines = [(str(size), *(cells.get((size, count), "-") for count in batches)) for size in sizes]
    print("Solver only, ms per matrix")
    print(text_table(("N", *(f"b{count}" for count in batches)), lines))


def main() -> None:
    """Run what was asked for, print it, and write it where --output says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="*", choices=MODELS, default=["60M", "350M", "1B", "3B"])
    parser.add_argument("--sizes", nargs="*", type=int, default=list(SIZES))
    parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES))
    parser.add_argument("--memory", type=float, default=4.0, help="GB for a batch (default 4)")
    parser.add_argument("--repeats", type=int, default=3, help="the median of so many (default 3)")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--output", type=Path, help="JSON file of all figures")
    arguments = parser.parse_args()

    figures: dict[str, Any] = {**card_and_versions(arguments.device), "models": [], "sizes": []}
    print(", ".join(f"{name} {figures[name]}" for name in ("card", "torch", "cusolver", "solver")))
    print(f"weights in {arguments.dtype}, {arguments.memory:g} GB for a batch\n")
    for name in arguments.models:
        figures["models"].append(
            measure_model(
                name,
                device=arguments.device,
                dtype=getattr(torch, arguments.dtype),
                memory=arguments.memory * 1e9,
                repeats=arguments.repeats,
            )
        )
        if arguments.device == "cuda":
            torch.cuda.empty_cache()
    if figures["models"]:
        print_models(figures["models"])
    for size in arguments.sizes:
        figures["sizes"].extend(measure_size(size, arguments))
    if figures["sizes"]:
        print_sizes(figures["sizes"], arguments.batches)
    if arguments.output:
        with replaced_file(arguments.output) as partial:
            partial.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
