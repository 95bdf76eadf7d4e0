"""Spectra of matrices of a model's shapes, without the model."""

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks.sharded_bias import pooled
from megatron_llr.spectrum import analyze_matrix
from megatron_llr.spectrum.eigenvalues import eigenvalues_of

_SPREAD = 0.02


def _timed(device: str, function: Callable[[], Any]) -> tuple[float, Any]:
    if device == "cuda":
        torch.cuda.synchronize()
    begun = time.perf_counter()
    result = function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun, result


def _gaussian(rows: int, columns: int, device: str, seed: int) -> torch.Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    values = torch.randn(rows, columns, generator=generator, device=device)
    return (values * _SPREAD).bfloat16()


def _block(hidden: int, ffn: int, device: str, seed: int) -> list[torch.Tensor]:
    """The seven matrices of a block at their initial values."""
    shapes = [(hidden, hidden)] * 4 + [(ffn, hidden)] * 2 + [(hidden, ffn)]
    return [_gaussian(*shape, device, 7 * seed + place) for place, shape in enumerate(shapes)]


def _spiked(weight: torch.Tensor) -> torch.Tensor:
    """The matrix with one singular value so large that an fp32 Gram matrix does not hold it."""
    rows, columns = weight.shape
    size = 1000 * _SPREAD * max(rows, columns) ** 0.5
    direction = torch.ones(rows, 1, device=weight.device) @ torch.ones(
        1, columns, device=weight.device
    )
    return weight.float() + direction * (size / (rows * columns) ** 0.5)


def measure(device: str, *, hidden: int, ffn: int, blocks: int, seconds: float) -> dict[str, Any]:
    """Time the spectra of a block, for as many of a model's blocks as the time allows.

    Args:
        device: cuda or cpu.
        hidden: width of the model.
        ffn: width inside its MLP.
        blocks: its blocks.
        seconds: after which no further block is begun.

    Returns:
        Median seconds of a block, how many were measured, how their eigenvalues were got; the same
        of a block whose matrices need fp64.
    """

    def spectra(weights: list[torch.Tensor]) -> list[str]:
        return [analyze_matrix(weight).method for weight in weights]

    # Loads the solver's libraries, and takes the memory that they keep.
    spectra(_block(hidden, ffn, device, 0))
    spent: list[float] = []
    methods: list[str] = []
    while len(spent) < blocks and sum(spent) < seconds:
        weights = _block(hidden, ffn, device, len(spent))
        took, methods = _timed(device, partial(spectra, weights))
        spent.append(took)
    spikes = [_spiked(weight) for weight in _block(hidden, ffn, device, 0)]
    slow, slow_methods = _timed(device, partial(spectra, spikes))
    return {
        "block_seconds": statistics.median(spent),
        "measured_blocks": len(spent),
        "blocks": blocks,
        "methods": sorted(set(methods)),
        "fp64_block_seconds": slow,
        "fp64_methods": sorted(set(slow_methods)),
    }


def sharded(device: str, *, sides: list[int]) -> dict[str, Any]:
    """Pooled spectra of shards against the exact one: exponents, and a rank's time for its part.

    Args:
        device: cuda or cpu.
        sides: rows and columns of the matrix.
    """
    rows = []
    weight = _gaussian(sides[0], sides[1], device, 0).float()
    eigenvalues_of(weight)
    seconds, exact = _timed(device, lambda: analyze_matrix(weight))
    for dim, name in enumerate(("rows", "columns")):
        for ways in (2, 4, 8):
            part = weight.chunk(ways, dim)[0].contiguous()
            eigenvalues_of(part)
            part_seconds, _ = _timed(device, partial(eigenvalues_of, part))
            alpha = pooled(weight, ways, dim)
            rows.append({"cut": f"{name}/{ways}", "alpha": alpha, "seconds": part_seconds})
    return {"sides": sides, "alpha": exact.alpha_hill_median, "seconds": seconds, "cuts": rows}
