"""Eigenvalues of WᵀW for many matrices: those of equal smaller side are solved as one stack.

Shapes: `B` matrices in a batch, each with `N` = min(rows, columns) eigenvalues.

Where torch is older than 2.12 and its cuSOLVER cannot be called directly (`cusolver`), a stack is
solved matrix by matrix: nothing is gained, nothing else changes. On H200 a matrix then takes 7.2,
9.9, 23 and 35 ms at 768, 1024, 2048 and 2560 eigenvalues, instead of 1.1, 1.7, 9.9 and 18.6 ms.
"""

import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial

import torch

from megatron_llr.errors import first_line
from megatron_llr.spectrum import cusolver
from megatron_llr.spectrum.eigenvalues import (
    FP32_GRAM_RANGE,
    FP64_GRAM_RANGE,
    SMALL,
    eigenvalues_of,
    full_precision,
    is_solvers,
    plain_matrix,
    stands_clear,
)

logger = logging.getLogger(__name__)

Spectrum = tuple[torch.Tensor, str]
"""[N] fp64 eigenvalues, ascending, and how they were got (`SpectrumRecord.method`)."""

# The solver counts the elements of a stack in 32 bits.
_MOST_ELEMENTS = 2**31 - 1
# What a matrix of a batch takes, in Gram matrices: itself, the copy that torch makes, and the
# solver's workspace (4.05 of them at 1024 and at 4096 eigenvalues, measured on H200).
_GRAMS_PER_MATRIX = 6.25
# Up to so many eigenvalues a batch gains where it has so many matrices or more (H200, fp32: at 1024
# 4.4 times with 32, at 2048 2.3 times with 32 but 0.95 with 8, at 2560 1.85 times with 24 but 0.95
# with 8; at 4096 0.93 with 8).
_LEAST_BATCH = ((1024, 2), (2560, 16))

_STEPS: dict[str, tuple[torch.dtype, float]] = {
    "gram32": (torch.float32, FP32_GRAM_RANGE),
    "gram64": (torch.float64, FP64_GRAM_RANGE),
}
# Largest relative difference between the sum of the eigenvalues, the trace of the Gram matrix and
# the squared Frobenius norm of the weight. Rounding alone gives 2e-7 in fp32 and 1.3e-13 in fp64
# (CPU, 600 to 1024 eigenvalues, Gaussian, heavy-tailed and of nearly rank one); another matrix of
# the same shape and distribution is off by sqrt(2 / elements), 1.4e-3 at 1024x1024.
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-10}

# What the checks say of a matrix of a batch.
_GOOD, _NEXT_METHOD, _NOT_FINITE, _WRONG = range(4)
_REASONS = {
    _NOT_FINITE: "values that are not finite",
    _WRONG: "eigenvalues that do not add up to the squared Frobenius norm",
}


def memory_of(size: int, dtype: torch.dtype) -> int:
    """Bytes that a matrix of `size` eigenvalues takes in a batch, the weight itself left out."""
    return int(_GRAMS_PER_MATRIX * size * size * dtype.itemsize)


def gram_dtype(size: int, *, full: bool) -> torch.dtype:
    """Dtype of the first Gram matrix that is formed for a matrix of `size` eigenvalues."""
    return torch.float64 if full or size <= SMALL else torch.float32


def batch_size(size: int, count: int, dtype: torch.dtype, memory: float, device: str) -> int:
    """How many of `count` matrices are solved at once; 1 where a batch gains nothing.

    A function of its arguments alone, never of free memory, so that a run that is resumed measures
    in the same batches.

    Args:
        size: eigenvalues of each matrix.
        count: matrices.
        dtype: that of the Gram matrices.
        memory: bytes that a batch may take; one matrix always may.
        device: type of the device. On a CPU a solver has all cores for one matrix: a batch gains
            nothing.
    """
    if device != "cuda":
        return 1
    least = next((few for limit, few in _LEAST_BATCH if size <= limit), None)
    if least is None:
        return 1
    most = min(int(memory / memory_of(size, dtype)), _MOST_ELEMENTS // (size * size))
    if min(most, count) < least:
        return 1
    # Batches of equal size: a small last one gains less.
    return -(-count // -(-count // most))


def eigenvalues_in_batches(
    weights: Sequence[torch.Tensor],
    *,
    full: bool = False,
    memory: float = 4e9,
    names: Sequence[str] | None = None,
    alone: Callable[[int], Spectrum] | None = None,
    size_of_batch: int | None = None,
) -> list[Spectrum]:
    """Squared singular values of matrices of any shapes.

    A matrix whose result fails a check is solved again by itself and named in a warning.

    Args:
        weights: [rows, columns] each, any float dtype, on one device.
        full: whether the small eigenvalues are needed too, as of `eigenvalues_of`.
        memory: bytes that a batch may take beside the weights.
        names: what warnings call the matrices.
        alone: solves the matrix of that index by itself; `eigenvalues_of` if not given.
        size_of_batch: matrices solved at once, in place of `batch_size`.

    Returns:
        For each matrix what `eigenvalues_of` gives.

    Raises:
        ValueError: if one is not a matrix of real floating-point values that lie in memory.
        RuntimeError: where no other solver could help: memory ran out for one matrix, the device is
            lost.
    """
    plain = [plain_matrix(weight) for weight in weights]
    names = names or [f"matrix {index}" for index in range(len(weights))]
    alone = alone or (lambda index: eigenvalues_of(plain[index], full=full))
    by_size: dict[int, list[int]] = defaultdict(list)
    for index, weight in enumerate(plain):
        by_size[min(weight.shape)].append(index)
    found: dict[int, Spectrum] = {}
    for size, members in by_size.items():
        left = members
        for method, (dtype, allowed_range) in _STEPS.items():
            if method == "gram32" and gram_dtype(size, full=full) != torch.float32:
                continue
            at_once = size_of_batch or batch_size(
                size, len(left), dtype, memory, plain[left[0]].device.type
            )
            if at_once == 1 and size_of_batch is None:
                break
            solve = partial(_solve_stack, dtype=dtype, allowed_range=allowed_range)
            solved = _in_chunks(plain, left, at_once, solve, names)
            left = []
            for index, (values, state) in solved.items():
                if state == _GOOD:
                    found[index] = values, method
                elif state == _NEXT_METHOD:
                    left.append(index)
                elif state in _REASONS:
                    logger.warning(
                        "megatron_llr: %s: %s in a batch; it is solved by itself",
                        names[index],
                        _REASONS[state],
                    )
            if not left:
                break
    return [found[index] if index in found else alone(index) for index in range(len(plain))]


Solved = tuple[torch.Tensor, int]
_NO_SPECTRUM = torch.empty(0, dtype=torch.float64)
_GIVEN_UP = -1


def _in_chunks(
    weights: Sequence[torch.Tensor],
    members: Sequence[int],
    at_once: int,
    solve: Callable[[Sequence[torch.Tensor]], list[Solved]],
    names: Sequence[str],
) -> dict[int, Solved]:
    """Solve batch by batch; halve them where memory runs out, give one up where a solver fails."""
    solved: dict[int, Solved] = {}
    first = 0
    while first < len(members):
        chunk = members[first : first + at_once]
        result: list[Solved] | None = None
        reason, is_memory = "", False
        try:
            result = solve([weights[index] for index in chunk])
        except RuntimeError as error:
            # What the failed attempt holds is released where this block ends.
            reason = f"{type(error).__name__}: {first_line(error)}"
            is_memory = _is_memory(error)
            if not is_memory and not is_solvers(error):
                raise
        if result is not None:
            solved.update(zip(chunk, result, strict=True))
            first += len(chunk)
            continue
        called = names[chunk[0]] + (f" and {len(chunk) - 1} more" if len(chunk) > 1 else "")
        if is_memory and len(chunk) > 1:
            at_once = -(-len(chunk) // 2)
            remedy = f"batches of {at_once} from here on"
            if weights[chunk[0]].is_cuda:
                torch.cuda.empty_cache()
        else:
            solved.update((index, (_NO_SPECTRUM, _GIVEN_UP)) for index in chunk)
            first += len(chunk)
            remedy = "they are solved one by one"
        logger.warning("megatron_llr: a batch (%s) failed: %s; %s", called, reason, remedy)
    return solved


def _is_memory(error: RuntimeError) -> bool:
    text = str(error)
    return isinstance(error, torch.OutOfMemoryError) or "ALLOC_FAILED" in text


def solve_grams(gram: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """[B, N] eigenvalues and, where the solver says so matrix by matrix, what did not converge."""
    if cusolver.is_wanted(gram):
        try:
            values, info = cusolver.eigvalsh_batched(gram)
        except cusolver.CuSolverError as error:
            cusolver.give_up(error)
        else:
            return values, info != 0
    return torch.linalg.eigvalsh(gram), None


@torch.no_grad()
def _solve_stack(
    weights: Sequence[torch.Tensor], *, dtype: torch.dtype, allowed_range: float
) -> list[Solved]:
    """Eigenvalues of matrices of equal smaller side, and what the checks say of each.

    All checks run on the device. Their results are copied once, which is the only synchronization
    beside that of the solver (torch's waits for its error codes).
    """
    size, device = min(weights[0].shape), weights[0].device
    gram = torch.empty(len(weights), size, size, dtype=dtype, device=device)
    norms = torch.empty(len(weights), dtype=torch.float64, device=device)
    with full_precision():
        for weight, product, norm in zip(weights, gram, norms, strict=True):
            matrix = weight.to(dtype)
            if matrix.shape[0] > matrix.shape[1]:
                matrix = matrix.T
            torch.mm(matrix, matrix.T, out=product)
            norm.copy_(torch.linalg.vector_norm(weight, dtype=torch.float64))
        norms = norms.square()
        traces = gram.diagonal(dim1=1, dim2=2).double().sum(1)
        finite = torch.isfinite(norms) & torch.isfinite(traces)
        # No element of a Gram matrix exceeds its trace. What is not finite must reach no solver: it
        # may fail for the whole batch.
        gram.masked_fill_(~finite[:, None, None], 0.0)
        values, failed = solve_grams(gram)
        values = values.double()
        sums = values.sum(1)
        allowed = TOLERANCE[dtype]
        # Written so that NaN is found out.
        right = ((sums - traces).abs() <= allowed * traces) & (values.diff() >= 0).all(1)
        # Squares of small weights may underflow, which a wider dtype mends.
        formed = (traces - norms).abs() <= allowed * norms
        values = values.clamp_min(0.0)
        good = formed & stands_clear(values, allowed_range)
        state = torch.where(good, _GOOD, _NEXT_METHOD)
        state = torch.where(right, state, _WRONG)
        if failed is not None:
            state = torch.where(failed, _WRONG, state)
        state = torch.where(finite, state, _NOT_FINITE)
    return list(zip(values.unbind(), state.tolist(), strict=True))
