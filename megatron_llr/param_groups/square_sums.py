"""Sums of squares per matrix: of the tensors that optimizers step, or of what a step changed."""

import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch

from megatron_llr.param_groups.fused_support import is_on_cuda
from megatron_llr.param_groups.views import Part, Window, windows

if TYPE_CHECKING:
    from megatron_llr.param_groups.squares_kernel import SquareTable

Kind = tuple[torch.device, torch.dtype]
"""Device and dtype of the tensors that share a table of chunks."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Tensors as they were.

    Attributes:
        kinds: of all tensors when it was taken.
        packed: one copy per table of chunks.
        copies: the tensors that no table has, flattened.
    """

    kinds: list[Kind | None]
    packed: list[torch.Tensor]
    copies: list[torch.Tensor]


class SquareSums:
    """Sums of squares of the elements of every matrix in some tensors.

    On CUDA the ranges of all matrices are in one table of chunks per dtype, and a sum takes two
    launches per table. Tables are built at the first use, and again when a tensor has other memory.
    Elsewhere, and for tensors that the kernel cannot read, a norm per window of a matrix.

    Args:
        parts: tensors and the matrices in each.
        rows: matrix id -> its place in the results.
        batched: False for a norm per window on CUDA too.
    """

    def __init__(
        self,
        parts: Sequence[tuple[torch.Tensor, tuple[Part, ...]]],
        rows: Mapping[str, int],
        *,
        batched: bool = True,
    ) -> None:
        self._parts = list(parts)
        self._windows = [[windows(r, strided=True) for _, r in found] for _, found in parts]
        self._rows = rows
        self._batched = batched
        self._memory: list[int] | None = None
        self._kinds: list[Kind | None] = []
        self._tables: list[SquareTable] = []

    @torch.no_grad()
    def of_tensors(self, device: torch.device) -> torch.Tensor:
        """Sum of squares per matrix, now: [rows] fp64 on `device`."""
        self._build_if_changed()
        return self._joined([table.sums() for table in self._tables], self._flat(), device)

    @torch.no_grad()
    def snapshot(self) -> Snapshot:
        """A copy of the tensors, for `of_changes`."""
        self._build_if_changed()
        packed = [table.snapshot() for table in self._tables]
        return Snapshot(self._kinds, packed, [flat.clone() for flat in self._flat()])

    @torch.no_grad()
    def of_changes(self, since: Snapshot, device: torch.device) -> torch.Tensor | None:
        """Sum of squared changes per matrix: [rows] fp64 on `device`.

        Args:
            since: overwritten.
            device: where the result is to be.

        Returns:
            None if a tensor has since moved to another device.
        """
        self._build_if_changed()
        if self._kinds != since.kinds:
            return None
        sums = [table.sums(old) for table, old in zip(self._tables, since.packed, strict=True)]
        moved = [old.sub_(now) for old, now in zip(since.copies, self._flat(), strict=True)]
        return self._joined(sums, moved, device)

    def _flat(self) -> list[torch.Tensor]:
        """The tensors that no table has."""
        pairs = zip(self._parts, self._kinds, strict=True)
        return [tensor.detach().view(-1) for (tensor, _), kind in pairs if kind is None]

    def _joined(
        self, sums: Sequence[torch.Tensor], flat: Sequence[torch.Tensor], device: torch.device
    ) -> torch.Tensor:
        if flat:
            sums = [*sums, self._by_windows(flat)]
        if not sums:
            return torch.zeros(len(self._rows), dtype=torch.float64, device=device)
        total, *others = (each.to(device, non_blocking=True) for each in sums)
        for other in others:
            total += other
        return total

    def _by_windows(self, flat: Sequence[torch.Tensor]) -> torch.Tensor:
        """Of the tensors that no table has: [rows] fp64, on the CPU; one copy per device."""
        every = zip(self._parts, self._windows, self._kinds, strict=True)
        chosen = [(parts, shown) for (_, parts), shown, kind in every if kind is None]
        cells: dict[torch.device, list[int]] = defaultdict(list)
        squares: dict[torch.device, list[torch.Tensor]] = defaultdict(list)
        for tensor, (parts, shown) in zip(flat, chosen, strict=True):
            for (matrix, _), of_matrix in zip(parts, shown, strict=True):
                cells[tensor.device].append(self._rows[matrix])
                squares[tensor.device].append(_square_sum(tensor, of_matrix))
        sums = torch.zeros(len(self._rows), dtype=torch.float64)
        for place, rows in cells.items():
            values = torch.stack(squares[place]).cpu()
            sums.index_put_((torch.tensor(rows),), values, accumulate=True)
        return sums

    def _build_if_changed(self) -> None:
        memory = [tensor.data_ptr() for tensor, _ in self._parts]
        if memory == self._memory:
            return
        self._memory = memory
        self._kinds = [self._kind_of(tensor) for tensor, _ in self._parts]
        self._tables = [self._table_of(kind) for kind in dict.fromkeys(self._kinds) if kind]

    def _kind_of(self, tensor: torch.Tensor) -> Kind | None:
        """None for a tensor that the kernel cannot read."""
        # A subclass (quantized, distributed) may keep its elements in another form.
        readable = (
            self._batched
            and type(tensor) in (torch.Tensor, torch.nn.Parameter)
            and tensor.dtype in (torch.float32, torch.bfloat16)
            and tensor.is_contiguous()
            and (is_on_cuda(tensor) or os.environ.get("TRITON_INTERPRET") == "1")
            and find_spec("triton") is not None
        )
        return (tensor.device, tensor.dtype) if readable else None

    def _table_of(self, kind: Kind) -> "SquareTable":
        from megatron_llr.param_groups.squares_kernel import SquareTable

        chosen = [p for p, other in zip(self._parts, self._kinds, strict=True) if other == kind]
        ranges = [
            (number, self._rows[matrix], found)
            for number, (_, parts) in enumerate(chosen)
            for matrix, found in parts
        ]
        return SquareTable.of([tensor.detach() for tensor, _ in chosen], ranges, len(self._rows))


def _square_sum(flat: torch.Tensor, shown: Sequence[Window]) -> torch.Tensor:
    """Sum of squares in windows of a flattened tensor: fp64, no dimensions, on its device."""
    norms: list[torch.Tensor] = [
        torch.linalg.vector_norm(window.of(flat), dtype=torch.float64) for window in shown
    ]
    if len(norms) == 1:
        return norms[0].square()
    # Nothing of a matrix may lie here: a slice of a vocabulary's padding alone.
    return torch.stack(norms).square().sum() if norms else flat.new_zeros((), dtype=torch.float64)
