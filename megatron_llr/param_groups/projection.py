"""The projection of a hyperball step around any optimizer's own step.

The tensors are zero while the optimizer steps them, and a copy keeps the weights. What the step
leaves in them at rate 1 and weight decay 0 is -u.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_llr.param_groups.fused_support import is_readable_by_kernels, upload
from megatron_llr.param_groups.hyperball_norms import NormSums
from megatron_llr.param_groups.stepped_tensor import Ranges
from megatron_llr.param_groups.views import windows


@dataclass(frozen=True, slots=True)
class HyperballPart:
    """The elements of one matrix in a tensor.

    Attributes:
        row: index of the matrix in the sums.
        counted: ranges of the elements that are in the sums.
        padding: ranges of rows that pad the vocabulary: they are scaled with the matrix.
    """

    row: int
    counted: Ranges
    padding: Ranges

    @property
    def ranges(self) -> Ranges:
        """All elements, ascending."""
        return tuple(sorted((*self.counted, *self.padding)))


HyperballTensor = tuple[torch.Tensor, tuple[HyperballPart, ...]]
"""A tensor, and the elements of its matrices."""


class Projection(ABC):
    """Sums over the matrices in some tensors after a step, and new weights in them.

    Args:
        tensors: fp32 tensors whose matrices all have a hyperball step.
        sums: sums over the matrices.
    """

    def __init__(self, tensors: Sequence[HyperballTensor], sums: NormSums) -> None:
        self._tensors = [tensor.detach() for tensor, _ in tensors]
        self._parts = [parts for _, parts in tensors]
        self._sums = sums
        self._weights: list[torch.Tensor] = []

    def begin(self) -> None:
        """Copy the weights and set the tensors to zero."""
        self._weights = [tensor.clone() for tensor in self._tensors]
        if self._tensors:
            torch._foreach_zero_(self._tensors)

    def restore(self) -> None:
        """Set the tensors to the weights before `begin`."""
        for tensor, before in zip(self._tensors, self._weights, strict=True):
            tensor.copy_(before)
        self._weights = []

    @abstractmethod
    def local_sums(self) -> torch.Tensor:
        """|W|^2, |u|^2 and <W, u> over the elements on this rank: [3, matrices] fp64."""

    @abstractmethod
    def finish(self, moves: torch.Tensor) -> None:
        """Set the tensors to s W - a s u, and drop the copy.

        Args:
            moves: [2, matrices] fp64: s and a s.
        """


class KernelProjection(Projection):
    """On CUDA: one pass for all sums, and one launch for all tensors."""

    def __init__(self, tensors: Sequence[HyperballTensor], sums: NormSums) -> None:
        from megatron_llr.param_groups.adam_kernel import Chunks
        from megatron_llr.param_groups.hyperball_kernel import MatrixOrder

        super().__init__(tensors, sums)
        parts = [(index, part) for index, parts in enumerate(self._parts) for part in parts]
        device = sums.device
        counted = [(index, part.row, part.counted) for index, part in parts]
        self._counted = Chunks.of(counted, device)
        self._every = Chunks.of([(index, part.row, part.ranges) for index, part in parts], device)
        self._order = MatrixOrder.of(self._counted.row, len(sums.matrices))

    def local_sums(self) -> torch.Tensor:
        """|W|^2, |u|^2 and <W, u> over the elements on this rank: [3, matrices] fp64."""
        from megatron_llr.param_groups.hyperball_kernel import launch_sums, total_sums

        addresses = [[t.data_ptr() for t in tensors] for tensors in (self._weights, self._tensors)]
        self._addresses = upload(torch.tensor(addresses), self._sums.device)
        with torch.cuda.device_of(self._addresses):
            return total_sums(launch_sums(self._counted, self._addresses), self._order)

    def finish(self, moves: torch.Tensor) -> None:
        """Set the tensors to s W - a s u, and drop the copy."""
        from megatron_llr.param_groups.hyperball_kernel import launch_projection

        with torch.cuda.device_of(self._addresses):
            launch_projection(self._every, self._addresses, moves.float())
        # The allocator gives this memory only to later work of the same stream.
        self._weights = []


class WindowProjection(Projection):
    """On other devices: an operation for every window of a matrix."""

    def __init__(self, tensors: Sequence[HyperballTensor], sums: NormSums) -> None:
        super().__init__(tensors, sums)
        self._windows = [
            [(part.row, windows(part.ranges, strided=True)) for part in parts]
            for parts in self._parts
        ]

    def begin(self) -> None:
        """Copy the weights, sum their squares, and set the tensors to zero."""
        self._squares = self._sums.squares()
        super().begin()

    def local_sums(self) -> torch.Tensor:
        """|W|^2, |u|^2 and <W, u> over the elements on this rank: [3, matrices] fp64."""
        directions = self._sums.squares()
        # W - u: its square gives <W, u>.
        if self._tensors:
            torch._foreach_add_(self._tensors, self._weights)
        products = (self._squares + directions - self._sums.squares()) / 2
        return torch.stack([self._squares, directions, products])

    def finish(self, moves: torch.Tensor) -> None:
        """Set the tensors, which are W - u, to s W - a s u = (s - a s) W + a s (W - u)."""
        scales, taken = moves
        kept, taken = (scales - taken).float(), taken.float()
        for tensor, before, parts in zip(self._tensors, self._weights, self._windows, strict=True):
            new, old = tensor.view(-1), before.view(-1)
            for row, covering in parts:
                for window in covering:
                    window.of(new).mul_(taken[row]).add_(window.of(old).mul_(kept[row]))
        self._weights = []


def projection_of(tensors: Sequence[HyperballTensor], sums: NormSums) -> Projection:
    """The projection for some tensors: by kernels if they can read all of them."""
    by_kernels = bool(tensors) and all(is_readable_by_kernels(tensor) for tensor, _ in tensors)
    return KernelProjection(tensors, sums) if by_kernels else WindowProjection(tensors, sums)
