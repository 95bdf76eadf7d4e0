"""Sums of squares over the ranges of many matrices in two Triton launches, without atomics.

This module imports triton: import it only to run the kernels. With `TRITON_INTERPRET=1` set before
the import, the kernels run on CPU tensors, for tests.

Elements are squared and added in fp64, in an order that depends only on the table. The result is
bitwise reproducible, and within 1e-12 relative of the exact sum.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from megatron_llr.param_groups.adam_kernel import Chunks

_BLOCK = 1024
_WARPS = 4
_SUM_BLOCK = 256
"""Partial sums that one program of the second launch adds at a time."""


@triton.jit  # type: ignore[untyped-decorator]
def _square_kernel(  # type: ignore[no-untyped-def]
    addresses,  # [C] int64
    lengths,  # [C] int32
    positions,  # [C] int64, read if CHANGES
    before,  # packed elements of all chunks, read if CHANGES
    partials,  # [C] fp64, written
    BF16: tl.constexpr,
    CHANGES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    length = tl.load(lengths + program)
    address = tl.load(addresses + program)
    if BF16:
        start = address.to(tl.pointer_type(tl.bfloat16))
    else:
        start = address.to(tl.pointer_type(tl.float32))
    if CHANGES:
        earlier = before + tl.load(positions + program)
    total = tl.zeros((BLOCK,), tl.float64)
    for first in range(0, length, BLOCK):
        index = first + tl.arange(0, BLOCK)
        inside = index < length
        value = tl.load(start + index, mask=inside, other=0.0).to(tl.float32).to(tl.float64)
        if CHANGES:
            old = tl.load(earlier + index, mask=inside, other=0.0)
            value -= old.to(tl.float32).to(tl.float64)
        total += value * value
    tl.store(partials + program, tl.sum(total, axis=0))


@triton.jit  # type: ignore[untyped-decorator]
def _sum_kernel(  # type: ignore[no-untyped-def]
    partials,  # [C] fp64
    offsets,  # [R + 1] int64, first chunk of every row
    sums,  # [R] fp64, written
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    first = tl.load(offsets + row)
    last = tl.load(offsets + row + 1)
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(first, last, BLOCK):
        index = start + tl.arange(0, BLOCK)
        total += tl.load(partials + index, mask=index < last, other=0.0)
    tl.store(sums + row, tl.sum(total, axis=0))


@triton.jit  # type: ignore[untyped-decorator]
def _copy_kernel(  # type: ignore[no-untyped-def]
    addresses,  # [C] int64
    lengths,  # [C] int32
    positions,  # [C] int64
    target,  # packed elements of all chunks, written
    BF16: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    length = tl.load(lengths + program)
    address = tl.load(addresses + program)
    if BF16:
        start = address.to(tl.pointer_type(tl.bfloat16))
    else:
        start = address.to(tl.pointer_type(tl.float32))
    end = target + tl.load(positions + program)
    for first in range(0, length, BLOCK):
        index = first + tl.arange(0, BLOCK)
        inside = index < length
        tl.store(end + index, tl.load(start + index, mask=inside), mask=inside)


@dataclass(frozen=True, slots=True)
class SquareTable:
    """Chunks of the ranges of matrices in tensors of one dtype on one device, sorted by row.

    The addresses are valid while the tensors keep their memory.

    Attributes:
        addresses: [C] int64, address of the first element of a chunk.
        lengths: [C] int32, number of elements.
        positions: [C] int64, offset of the chunk in a packed copy of all chunks.
        offsets: [R + 1] int64, first chunk of every row.
        elements: number of elements of all chunks.
        dtype: fp32 or bf16.
    """

    addresses: torch.Tensor
    lengths: torch.Tensor
    positions: torch.Tensor
    offsets: torch.Tensor
    elements: int
    dtype: torch.dtype

    @classmethod
    def of(
        cls,
        tensors: Sequence[torch.Tensor],
        ranges: Sequence[tuple[int, int, Sequence[tuple[int, int]]]],
        rows: int,
    ) -> "SquareTable":
        """Divide ranges into chunks.

        Args:
            tensors: contiguous, of one dtype, on one device.
            ranges: (index of a tensor, row, ranges as (first, one past last)).
            rows: number of rows.
        """
        device, dtype = tensors[0].device, tensors[0].dtype
        by_row = sorted(ranges, key=lambda each: each[1])
        chunks = Chunks.of(by_row, torch.device("cpu"))
        starts = torch.tensor([tensor.data_ptr() for tensor in tensors])
        addresses = starts[chunks.tensor.long()] + chunks.first * dtype.itemsize
        lengths = chunks.length.long()
        ends = lengths.cumsum(0)
        counts = torch.bincount(chunks.row.long(), minlength=rows)
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        return cls(
            addresses=addresses.to(device),
            lengths=chunks.length.to(device),
            positions=(ends - lengths).to(device),
            offsets=offsets.to(device),
            elements=int(lengths.sum()),
            dtype=dtype,
        )

    def snapshot(self) -> torch.Tensor:
        """A packed copy of all chunks, on the current stream: one launch."""
        target = torch.empty(self.elements, dtype=self.dtype, device=self.addresses.device)
        count = self.addresses.numel()
        if count:
            with torch.cuda.device_of(target):
                _copy_kernel[(count,)](
                    self.addresses,
                    self.lengths,
                    self.positions,
                    target,
                    BF16=self.dtype == torch.bfloat16,
                    BLOCK=_BLOCK,
                    num_warps=_WARPS,
                )
        return target

    def sums(self, before: torch.Tensor | None = None) -> torch.Tensor:
        """Sum of squares per row, [R] fp64, on the current stream: two launches.

        Args:
            before: a snapshot. The sums are then of the changes since.
        """
        device = self.addresses.device
        rows, count = self.offsets.numel() - 1, self.addresses.numel()
        if count == 0:
            return torch.zeros(rows, dtype=torch.float64, device=device)
        partials = torch.empty(count, dtype=torch.float64, device=device)
        sums = torch.empty(rows, dtype=torch.float64, device=device)
        with torch.cuda.device_of(sums):
            _square_kernel[(count,)](
                self.addresses,
                self.lengths,
                self.positions,
                partials if before is None else before,
                partials,
                BF16=self.dtype == torch.bfloat16,
                CHANGES=before is not None,
                BLOCK=_BLOCK,
                num_warps=_WARPS,
            )
            _sum_kernel[(rows,)](partials, self.offsets, sums, BLOCK=_SUM_BLOCK, num_warps=_WARPS)
        return sums
