"""`SteppedTensor`: a tensor that an inner optimizer steps, and the weight that it updates."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from megatron_llr.matrices.ids import MatrixId

Ranges = tuple[tuple[int, int], ...]
"""Ranges of elements in a flattened tensor: (first, one past last), ascending."""

MatrixRanges = tuple[MatrixId, Ranges]
"""Matrix id, and the ranges of its elements in a flattened tensor."""

Factors = Callable[[MatrixId, float], tuple[float, float]]
"""Matrix id and its multiplier -> factors on the learning rate and on the weight decay."""


@dataclass(frozen=True, eq=False)
class SteppedTensor:
    """A tensor that an inner optimizer steps.

    Attributes:
        tensor: the tensor in the optimizer's param groups: a whole weight, or a flat slice of one.
        parameter: the model parameter that it updates.
        start: first element of the slice, in the flattened parameter.
        split: whether the optimizer steps the whole tensor but updates each matrix in it separately
            (Muon with query, key and value split).
    """

    tensor: torch.Tensor
    parameter: torch.nn.Parameter
    start: int = 0
    split: bool = False

    @property
    def stop(self) -> int:
        """One past the last element of the slice."""
        return self.start + self.tensor.numel()


TensorMatrices = tuple[SteppedTensor, tuple[MatrixRanges, ...]]
"""A stepped tensor, and the ranges of the matrices in it."""


def gaps(ranges: Iterable[tuple[int, int]], count: int) -> Ranges:
    """The ranges of a tensor of `count` elements that lie in none of the given ones.

    Args:
        ranges: (first, one past last), ascending.
        count: number of elements.
    """
    between, position = [], 0
    for first, last in ranges:
        if first > position:
            between.append((position, first))
        position = max(position, last)
    if position < count:
        between.append((position, count))
    return tuple(between)
