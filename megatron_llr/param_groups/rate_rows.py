"""The rows of the fused step's table of learning rates, and the elements that each applies to."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from megatron_llr.matrices.ids import MatrixId
from megatron_llr.param_groups.hyperball import HyperballStep
from megatron_llr.param_groups.stepped_tensor import MatrixRanges, Ranges, gaps

_NO_MATRIX = MatrixId("none")
"""Matrix id of elements that belong to no matrix. Their multiplier is 1."""


@dataclass(frozen=True, slots=True)
class RateRow:
    """Elements with one learning rate and weight decay.

    Attributes:
        group: index of their param group.
        matrix: their matrix.
        hyperball: its index in the sums of hyperball steps; -1 without one.
        counted: whether they are in those sums.
    """

    group: int
    matrix: MatrixId
    hyperball: int = -1
    counted: bool = False


def rate_rows(
    tensor: torch.Tensor,
    parts: tuple[MatrixRanges, ...],
    group: int,
    hyperball: HyperballStep | None,
) -> Iterator[tuple[RateRow, Ranges]]:
    """The rows of a tensor, with the ranges of their elements, which cover the tensor.

    Args:
        tensor: a stepped tensor.
        parts: the matrices in it.
        group: index of its param group.
        hyperball: the hyperball step of some matrices.
    """
    projected = set()
    if hyperball is not None and id(tensor) in hyperball.tensors:
        names = hyperball.sums.matrices
        for part in hyperball.tensors[id(tensor)][1]:
            projected.add(names[part.row])
            for ranges, counted in ((part.counted, True), (part.padding, False)):
                yield RateRow(group, names[part.row], part.row, counted), ranges
    for matrix, ranges in _covering(parts, tensor.numel()):
        if matrix not in projected:
            yield RateRow(group, matrix), ranges


def _covering(parts: tuple[MatrixRanges, ...], count: int) -> list[MatrixRanges]:
    """Ranges that cover a tensor of `count` elements. Those of no matrix have id `_NO_MATRIX`."""
    if len(parts) < 2:
        # Rows that pad a vocabulary are stepped with its matrix.
        return [(parts[0][0] if parts else _NO_MATRIX, ((0, count),))]
    between = gaps(sorted(run for _, ranges in parts for run in ranges), count)
    return [*parts, (_NO_MATRIX, between)] if between else list(parts)
