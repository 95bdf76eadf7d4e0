"""Sums of squares per matrix: of the tensors that optimizers step, or of their changes."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from megatron_llr.matrices.ids import MatrixId
from megatron_llr.param_groups.fused_support import is_readable_by_kernels
from megatron_llr.param_groups.stepped_tensor import MatrixRanges
from megatron_llr.param_groups.views import windows

if TYPE_CHECKING:
    from megatron_llr.param_groups.squares_kernel import SquareTable

TableKey = tuple[torch.device, torch.dtype]
"""Device and dtype of the tensors in one table of chunks."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Copies of tensors at one time.

    Attributes:
        keys: table key of every tensor at that time; None for tensors in no table.
        packed: one copy per table of chunks.
        copies: the tensors in no table, flattened.
    """

    keys: list[TableKey | None]
    packed: list[torch.Tensor]
    copies: list[torch.Tensor]


class SquareSums:
    """Sums of squares of the elements of every matrix in some tensors.

    On CUDA there is one table of chunks per dtype, with the ranges of all matrices, and a sum needs
    two launches per table. Tables are built at the first use, and again when the memory of a tensor
    was replaced. On other devices, and for tensors that the kernel cannot read, one norm is
    computed per window of a matrix.

    Args:
        parts: tensors and the matrices in each.
        rows: matrix id -> index in the results.
        batched: False for one norm per window on CUDA too.
    """

    def __init__(
        self,
        parts: Sequence[tuple[torch.Tensor, tuple[MatrixRanges, ...]]],
        rows: Mapping[MatrixId, int],
        *,
        batched: bool = True,
    ) -> None:
        self._parts = list(parts)
        self._windows = [[windows(r, strided=True) for _, r in ranges] for _, ranges in parts]
        self._rows = rows
        self._batched = batched
        self._memory: list[int] | None = None
        self._keys: list[TableKey | None] = []
        self._tables: list[SquareTable] = []

    @torch.no_grad()
    def of_tensors(self, device: torch.device) -> torch.Tensor:
        """Current sum of squares per matrix: [rows] fp64 on `device`."""
        self._build_if_changed()
        return self._total([table.sums() for table in self._tables], self._flat(), device)

    @torch.no_grad()
    def snapshot(self) -> Snapshot:
        """A copy of the tensors, for `of_changes`."""
        self._build_if_changed()
        packed = [table.snapshot() for table in self._tables]
        return Snapshot(self._keys, packed, [flat.clone() for flat in self._flat()])

    @torch.no_grad()
    def of_changes(self, since: Snapshot, device: torch.device) -> torch.Tensor | None:
        """Sum of squared changes per matrix: [rows] fp64 on `device`.

        Args:
            since: overwritten.
            device: of the result.

        Returns:
            None if a tensor has been moved to another device since.
        """
        self._build_if_changed()
        if self._keys != since.keys:
            return None
        sums = [table.sums(old) for table, old in zip(self._tables, since.packed, strict=True)]
        moved = [old.sub_(now) for old, now in zip(since.copies, self._flat(), strict=True)]
        return self._total(sums, moved, device)

    def _flat(self) -> list[torch.Tensor]:
        """The tensors in no table, flattened."""
        pairs = zip(self._parts, self._keys, strict=True)
        return [tensor.detach().view(-1) for (tensor, _), key in pairs if key is None]

    def _total(
        self, sums: Sequence[torch.Tensor], flat: Sequence[torch.Tensor], device: torch.device
    ) -> torch.Tensor:
        if flat:
            sums = [*sums, self._window_sums(flat)]
        if not sums:
            return torch.zeros(len(self._rows), dtype=torch.float64, device=device)
        total, *others = (each.to(device, non_blocking=True) for each in sums)
        for other in others:
            total += other
        return total

    def _window_sums(self, flat: Sequence[torch.Tensor]) -> torch.Tensor:
        """Sums of the tensors in no table: [rows] fp64 on the CPU, with one copy per device."""
        every = zip(self._parts, self._windows, self._keys, strict=True)
        in_no_table = [(parts, spans) for (_, parts), spans, key in every if key is None]
        rows: dict[torch.device, list[int]] = defaultdict(list)
        squares: dict[torch.device, list[torch.Tensor]] = defaultdict(list)
        for tensor, (parts, spans) in zip(flat, in_no_table, strict=True):
            for (matrix, _), of_matrix in zip(parts, spans, strict=True):
                norms: list[torch.Tensor] = [
                    torch.linalg.vector_norm(window.of(tensor), dtype=torch.float64)
                    for window in of_matrix
                ]
                if len(norms) == 1:
                    square = norms[0].square()
                elif norms:
                    square = torch.stack(norms).square().sum()
                else:
                    # A slice with only padding of a vocabulary has no element of its matrix.
                    square = tensor.new_zeros((), dtype=torch.float64)
                rows[tensor.device].append(self._rows[matrix])
                squares[tensor.device].append(square)
        sums = torch.zeros(len(self._rows), dtype=torch.float64)
        for device, indices in rows.items():
            values = torch.stack(squares[device]).cpu()
            sums.index_put_((torch.tensor(indices),), values, accumulate=True)
        return sums

    def _build_if_changed(self) -> None:
        """Build the tables again if the memory of a tensor was replaced."""
        memory = [tensor.data_ptr() for tensor, _ in self._parts]
        if memory == self._memory:
            return
        self._memory = memory
        self._keys = [self._key_of(tensor) for tensor, _ in self._parts]
        self._tables = []
        for key in dict.fromkeys(self._keys):
            if key is None:
                continue
            from megatron_llr.param_groups.squares_kernel import SquareTable

            in_table = [p for p, other in zip(self._parts, self._keys, strict=True) if other == key]
            ranges = [
                (index, self._rows[matrix], of_matrix)
                for index, (_, parts) in enumerate(in_table)
                for matrix, of_matrix in parts
            ]
            tensors = [tensor.detach() for tensor, _ in in_table]
            self._tables.append(SquareTable.of(tensors, ranges, len(self._rows)))

    def _key_of(self, tensor: torch.Tensor) -> TableKey | None:
        """Table key of a tensor; None if the kernel cannot read it."""
        readable = self._batched and is_readable_by_kernels(tensor)
        return (tensor.device, tensor.dtype) if readable else None
