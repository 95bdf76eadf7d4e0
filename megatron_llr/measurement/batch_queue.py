"""A queue of matrices on a rank that are solved in batches of equal size, within a memory limit."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from megatron_llr.matrices.shard import MatrixShard


@dataclass(frozen=True)
class QueuedMatrix:
    """A matrix in the queue.

    Attributes:
        shard: the part of the matrix on this rank.
        weight: [rows, columns], the whole matrix.
        solver_bytes: memory that it needs in a batch, in addition to its weight.
    """

    shard: MatrixShard
    weight: torch.Tensor
    solver_bytes: int

    @property
    def bytes(self) -> int:
        """Memory that it needs. A view of its parameter needs none for the weight."""
        parameter = self.shard.parameter
        is_view = type(parameter) in (torch.Tensor, torch.nn.Parameter) and (
            self.weight.untyped_storage().data_ptr() == parameter.untyped_storage().data_ptr()
        )
        return (0 if is_view else self.weight.nbytes) + self.solver_bytes


class BatchQueue:
    """Matrices by number of eigenvalues, in the order in which they were added.

    The batches depend only on that order, the sizes of the matrices and the limit.

    Args:
        memory: bytes that all matrices in the queue may need. A single matrix may exceed it.
    """

    def __init__(self, memory: float) -> None:
        self._memory = memory
        self._by_size: dict[int, list[QueuedMatrix]] = {}

    def add(self, size: int, matrix: QueuedMatrix, limit: int) -> Iterator[list[QueuedMatrix]]:
        """Add a matrix.

        Args:
            size: number of its eigenvalues.
            matrix: the matrix.
            limit: number of matrices in a full batch of this size.

        Yields:
            Batches to solve now, because memory is exhausted or a batch is full.
        """
        while (
            self._by_size and sum(map(self._bytes_of, self._by_size)) + matrix.bytes > self._memory
        ):
            yield self._by_size.pop(max(self._by_size, key=self._bytes_of))
        self._by_size.setdefault(size, []).append(matrix)
        if len(self._by_size[size]) >= limit:
            yield self._by_size.pop(size)

    def drain(self) -> Iterator[list[QueuedMatrix]]:
        """All remaining matrices, batch by batch."""
        while self._by_size:
            yield self._by_size.pop(next(iter(self._by_size)))

    def _bytes_of(self, size: int) -> int:
        return sum(matrix.bytes for matrix in self._by_size[size])
