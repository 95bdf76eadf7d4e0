"""Matrices of a rank that wait until a batch of their size is full, within a memory limit."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from megatron_llr.matrices.shard import MatrixShard


@dataclass(frozen=True)
class Waiting:
    """A matrix that waits.

    Attributes:
        shard: what this rank knows of it.
        weight: [rows, columns], the whole matrix.
        solver_bytes: what it takes in a batch beside its weight.
    """

    shard: MatrixShard
    weight: torch.Tensor
    solver_bytes: int

    @property
    def bytes(self) -> int:
        """What it takes in all. A view of its parameter takes nothing of its own."""
        held = 0 if _is_view(self.weight, self.shard.parameter) else self.weight.nbytes
        return held + self.solver_bytes


def _is_view(weight: torch.Tensor, parameter: torch.Tensor) -> bool:
    if type(parameter) not in (torch.Tensor, torch.nn.Parameter):
        return False
    return weight.untyped_storage().data_ptr() == parameter.untyped_storage().data_ptr()


class Pending:
    """Matrices by number of eigenvalues, in the order in which they came.

    Which matrices share a batch follows from that order, their sizes and the limit alone.

    Args:
        memory: bytes that all that wait may take; one matrix may exceed it.
    """

    def __init__(self, memory: float) -> None:
        self._memory = memory
        self._by_size: dict[int, list[Waiting]] = {}

    def add(self, size: int, waiting: Waiting, most: int) -> Iterator[list[Waiting]]:
        """Let a matrix wait.

        Args:
            size: number of its eigenvalues.
            waiting: the matrix.
            most: matrices of this size in a full batch.

        Yields:
            Batches that are to be solved now: because memory would not do, or one is full.
        """
        while self._by_size and self._bytes() + waiting.bytes > self._memory:
            yield self._by_size.pop(max(self._by_size, key=self._bytes_of))
        self._by_size.setdefault(size, []).append(waiting)
        if len(self._by_size[size]) >= most:
            yield self._by_size.pop(size)

    def rest(self) -> Iterator[list[Waiting]]:
        """All that still wait, batch by batch."""
        while self._by_size:
            yield self._by_size.pop(next(iter(self._by_size)))

    def _bytes_of(self, size: int) -> int:
        return sum(waiting.bytes for waiting in self._by_size[size])

    def _bytes(self) -> int:
        return sum(map(self._bytes_of, self._by_size))
