"""Triton kernels of hyperball steps: sums over matrices, and the projection in one launch.

This module imports triton: import it only to run the kernels. With `TRITON_INTERPRET=1` set before
the import, the kernels run on CPU tensors, for tests.

Sums are accumulated in fp64 in an order that depends only on the tables of chunks, without atomics,
so they are bitwise reproducible.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from megatron_llr.param_groups.adam_kernel import Chunks, Formula, normalized

_BLOCK = 1024
_WARPS = 4
_SUM_BLOCK = 256
"""Chunks whose sums one program of `_total_kernel` adds at a time."""


@triton.jit  # type: ignore[untyped-decorator]
def _sums_kernel(  # type: ignore[no-untyped-def]
    weights,  # [T] int64 addresses of fp32 W
    negated,  # [T] int64 addresses of fp32 -u
    chunk_tensor,  # [C] int32
    chunk_first,  # [C] int64
    chunk_length,  # [C] int32
    partials,  # [C, 3] fp64, written
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    tensor = tl.load(chunk_tensor + program)
    first = tl.load(chunk_first + program)
    length = tl.load(chunk_length + program)
    fp32 = tl.pointer_type(tl.float32)
    w_start = tl.load(weights + tensor).to(fp32) + first
    n_start = tl.load(negated + tensor).to(fp32) + first
    squares = tl.zeros((BLOCK,), tl.float64)
    directions = tl.zeros((BLOCK,), tl.float64)
    products = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, length, BLOCK):
        index = start + tl.arange(0, BLOCK)
        inside = index < length
        weight = tl.load(w_start + index, mask=inside, other=0.0).to(tl.float64)
        direction = -tl.load(n_start + index, mask=inside, other=0.0).to(tl.float64)
        squares += weight * weight
        directions += direction * direction
        products += weight * direction
    sums = partials + 3 * program
    tl.store(sums, tl.sum(squares, axis=0))
    tl.store(sums + 1, tl.sum(directions, axis=0))
    tl.store(sums + 2, tl.sum(products, axis=0))


@triton.jit  # type: ignore[untyped-decorator]
def _total_kernel(  # type: ignore[no-untyped-def]
    partials,  # [C, 3] fp64
    order,  # [N] int64, chunks sorted by matrix
    offsets,  # [M + 1] int64, first entry of every matrix in `order`
    sums,  # [3, M] fp64, written
    matrices,
    BLOCK: tl.constexpr,
):
    matrix = tl.program_id(0)
    first = tl.load(offsets + matrix)
    last = tl.load(offsets + matrix + 1)
    weights = tl.zeros((BLOCK,), tl.float64)
    directions = tl.zeros((BLOCK,), tl.float64)
    products = tl.zeros((BLOCK,), tl.float64)
    for start in range(first, last, BLOCK):
        index = start + tl.arange(0, BLOCK)
        inside = index < last
        chunk = partials + 3 * tl.load(order + index, mask=inside, other=0)
        weights += tl.load(chunk, mask=inside, other=0.0)
        directions += tl.load(chunk + 1, mask=inside, other=0.0)
        products += tl.load(chunk + 2, mask=inside, other=0.0)
    tl.store(sums + matrix, tl.sum(weights, axis=0))
    tl.store(sums + matrices + matrix, tl.sum(directions, axis=0))
    tl.store(sums + 2 * matrices + matrix, tl.sum(products, axis=0))


@triton.jit  # type: ignore[untyped-decorator]
def _project_kernel(  # type: ignore[no-untyped-def]
    weights,  # [T] int64 addresses of fp32 W
    gradients,  # [T] int64 addresses, 0 if a tensor has no gradient; read if MOMENTS
    first_moments,  # [T] int64 addresses of fp32 exp_avg if MOMENTS, otherwise of -u, overwritten
    second_moments,  # [T] int64 addresses of fp32 exp_avg_sq; read if MOMENTS
    copies,  # [T] int64 addresses of bf16 weights; read if HAS_COPY
    corrections,  # [2, T] fp32 bias corrections; read if MOMENTS
    moves,  # [2, M] fp32: s, a s
    chunk_tensor,  # [C] int32
    chunk_first,  # [C] int64
    chunk_length,  # [C] int32
    chunk_matrix,  # [C] int32
    tensors,
    matrices,
    eps,
    MOMENTS: tl.constexpr,
    TORCH_ORDER: tl.constexpr,
    HAS_COPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    tensor = tl.load(chunk_tensor + program)
    first = tl.load(chunk_first + program)
    length = tl.load(chunk_length + program)
    matrix = tl.load(chunk_matrix + program)
    scale = tl.load(moves + matrix)
    step = tl.load(moves + matrices + matrix)
    fp32 = tl.pointer_type(tl.float32)
    w_start = tl.load(weights + tensor).to(fp32) + first
    m_start = tl.load(first_moments + tensor).to(fp32) + first
    if MOMENTS:
        target = w_start
        v_start = tl.load(second_moments + tensor).to(fp32) + first
        has_gradient = tl.load(gradients + tensor) != 0
        correction1 = tl.load(corrections + tensor)
        correction2 = tl.load(corrections + tensors + tensor)
        size = tl.full((), 1.0, tl.float32)
        if TORCH_ORDER:
            size = tl.div_rn(size, correction1)
    else:
        target = m_start
    if HAS_COPY:
        copy_start = tl.load(copies + tensor).to(tl.pointer_type(tl.bfloat16)) + first
    for start in range(0, length, BLOCK):
        index = start + tl.arange(0, BLOCK)
        inside = index < length
        weight = tl.load(w_start + index, mask=inside)
        if MOMENTS:
            # The same u as in the sums, to the bit.
            moved = inside & has_gradient
            m = tl.load(m_start + index, mask=moved, other=0.0)
            v = tl.load(v_start + index, mask=moved, other=0.0)
            update = normalized(m, v, correction1, correction2, eps, TORCH_ORDER)
            direction = tl.where(moved, size * update, 0.0)
        else:
            direction = -tl.load(m_start + index, mask=inside)
        weight = scale * weight - step * direction
        tl.store(target + index, weight, mask=inside)
        if HAS_COPY:
            tl.store(copy_start + index, weight.to(tl.bfloat16), mask=inside)


@dataclass(frozen=True, slots=True)
class MatrixOrder:
    """The chunks in the sums of every matrix.

    Attributes:
        order: [N] int64, chunks sorted by matrix.
        offsets: [M + 1] int64, first entry of every matrix in `order`.
    """

    order: torch.Tensor
    offsets: torch.Tensor

    @classmethod
    def of(cls, chunk_matrix: torch.Tensor, matrices: int) -> "MatrixOrder":
        """Sort chunks by matrix.

        Args:
            chunk_matrix: [C] matrix of every chunk; -1 for a chunk in no sum.
            matrices: number of matrices.
        """
        matrix = chunk_matrix.long().cpu()
        counts = torch.bincount(matrix + 1, minlength=matrices + 1)
        order = matrix.argsort(stable=True)[int(counts[0]) :]
        offsets = torch.cat([counts.new_zeros(1), counts[1:].cumsum(0)])
        return cls(order.to(chunk_matrix.device), offsets.to(chunk_matrix.device))


def total_sums(partials: torch.Tensor, order: MatrixOrder) -> torch.Tensor:
    """Sums over the chunks of every matrix, on the current stream: one launch.

    Args:
        partials: [C, 3] fp64 sums of every chunk.
        order: of the chunks.

    Returns:
        [3, M] fp64: |W|^2, |u|^2, <W, u>.
    """
    matrices = order.offsets.numel() - 1
    sums = torch.empty(3, matrices, dtype=torch.float64, device=partials.device)
    if matrices:
        _total_kernel[(matrices,)](
            partials, order.order, order.offsets, sums, matrices, BLOCK=_SUM_BLOCK, num_warps=_WARPS
        )
    return sums


def launch_sums(chunks: Chunks, addresses: torch.Tensor) -> torch.Tensor:
    """Sums over every chunk, on the current stream.

    Args:
        chunks: the chunks to read.
        addresses: [2, T] int64: fp32 W, fp32 -u.

    Returns:
        [C, 3] fp64: |W|^2, |u|^2, <W, u>.
    """
    count = chunks.tensor.numel()
    partials = torch.empty(count, 3, dtype=torch.float64, device=addresses.device)
    if count:
        _sums_kernel[(count,)](
            *addresses.unbind(0),
            chunks.tensor,
            chunks.first,
            chunks.length,
            partials,
            BLOCK=_BLOCK,
            num_warps=_WARPS,
        )
    return partials


def launch_projection(
    chunks: Chunks,
    addresses: torch.Tensor,
    moves: torch.Tensor,
    formula: Formula | None = None,
    corrections: torch.Tensor | None = None,
) -> None:
    """Set W to s W - a s u, on the current stream; no synchronization.

    Args:
        chunks: the chunks of matrices with a hyperball step; their `row` is the matrix.
        addresses: as for `launch_adam`: u is then computed from the moments, and 0 without a
            gradient. Without `formula`: [2, T] int64, fp32 W and fp32 -u, which W replaces.
        moves: [2, M] fp32: s and a s of every matrix.
        formula: of the launch that stepped the moments.
        corrections: as for that launch.
    """
    count = chunks.tensor.numel()
    if count == 0:
        return
    tables = list(addresses)
    if formula is None:
        weights, negated = tables
        tables = [weights, weights, negated, weights, weights]
    _project_kernel[(count,)](
        *tables,
        moves if corrections is None else corrections,
        moves,
        chunks.tensor,
        chunks.first,
        chunks.length,
        chunks.row,
        addresses.shape[1],
        moves.shape[1],
        0.0 if formula is None else formula.eps,
        MOMENTS=formula is not None,
        TORCH_ORDER=formula is not None and formula.torch_order,
        HAS_COPY=formula is not None and formula.has_copy,
        BLOCK=_BLOCK,
        num_warps=_WARPS,
    )
