"""Spectra of random matrices of a model's shapes, without the model."""

from functools import partial
from typing import Any

import torch

from benchmarks import measurement
from benchmarks.sharded_bias import pooled
from megatron_llr.spectrum import analyze_matrix
from megatron_llr.spectrum.eigenvalues import eigenvalues_of

_STANDARD_DEVIATION = 0.02


def _add_spike(weight: torch.Tensor) -> torch.Tensor:
    """The matrix with one singular value too large for an fp32 Gram matrix to hold the others."""
    rows, columns = weight.shape
    size = 1000 * _STANDARD_DEVIATION * max(rows, columns) ** 0.5
    return weight.float() + size / (rows * columns) ** 0.5


def measure_all_blocks(device: str, *, model: str, repeats: int) -> dict[str, Any]:
    """Time a measurement of all matrices in the blocks of a model, and slower ways to it.

    Args:
        device: cuda or cpu.
        model: a key of `measurement.MODELS`.
        repeats: the time is the median of this many measurements.

    Returns:
        What `measurement.measure_model` returns, and the time of all blocks if every matrix
        needed fp64, from one block, with the methods used.
    """
    shapes = measurement.MODELS[model]
    spiked = [_add_spike(weight) for weight in shapes.block(torch.bfloat16, device, 0)]
    methods: list[str] = []
    for _ in range(2):  # The first call loads the solver's libraries.
        methods.clear()
        seconds = measurement.seconds(
            lambda: methods.extend(analyze_matrix(weight).method for weight in spiked), device
        )
    figures = measurement.measure_model(
        model, device=device, dtype=torch.bfloat16, memory=4e9, repeats=repeats
    )
    return {
        **figures,
        "all_fp64_s": seconds * shapes.blocks,
        "fp64_methods": sorted(set(methods)),
    }


def compare_sharded(device: str, *, sides: list[int]) -> dict[str, Any]:
    """Pooled spectra of shards against the exact one: exponents, and a rank's time for its shard.

    Args:
        device: cuda or cpu.
        sides: rows and columns of the matrix.
    """
    generator = torch.Generator(device).manual_seed(0)
    weight = torch.randn(sides, generator=generator, device=device) * _STANDARD_DEVIATION
    # Rounded to bf16, as weights are in training.
    weight = weight.bfloat16().float()
    eigenvalues_of(weight)
    seconds = measurement.seconds(partial(analyze_matrix, weight), device)
    rows = []
    for dim, name in enumerate(("rows", "columns")):
        for ways in (2, 4, 8):
            shard = weight.chunk(ways, dim)[0].contiguous()
            eigenvalues_of(shard)
            shard_seconds = measurement.seconds(partial(eigenvalues_of, shard), device)
            alpha = pooled(weight, ways, dim)
            rows.append({"cut": f"{name}/{ways}", "alpha": alpha, "seconds": shard_seconds})
    alpha = analyze_matrix(weight).alpha_hill_median
    return {"sides": sides, "alpha": alpha, "seconds": seconds, "cuts": rows}
