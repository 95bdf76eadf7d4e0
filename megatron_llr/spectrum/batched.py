"""Eigenvalues of WᵀW for many matrices: those of equal smaller side are solved as one stack.

Shapes: `B` matrices in a batch, each with `N` = min(rows, columns) eigenvalues.

If torch is older than 2.12 and its cuSOLVER cannot be called directly (`cusolver`), a stack is
solved matrix by matrix, without a gain in time. On H200 a matrix then takes 7.2, 9.9, 23 and 35 ms
at 768, 1024, 2048 and 2560 eigenvalues, instead of 1.1, 1.7, 9.9 and 18.6 ms.
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
    is_solver_failure,
    is_tail_accurate,
    plain_matrix,
)

logger = logging.getLogger(__name__)

Spectrum = tuple[torch.Tensor, str]
"""[N] fp64 eigenvalues, ascending, and the method (`SpectrumRecord.method`)."""

# The solver counts the elements of a stack in 32 bits.
_MAX_ELEMENTS = 2**31 - 1
# Memory per matrix of a batch, in Gram matrices: the matrix itself, torch's copy, and the solver's
# workspace (4.05 Gram matrices at 1024 and at 4096 eigenvalues, measured on H200).
_GRAMS_PER_MATRIX = 6.25
# (eigenvalues up to, smallest batch that is faster than single matrices). H200, fp32: at 1024
# 4.4 times with 32, at 2048 2.3 times with 32 but 0.95 with 8, at 2560 1.85 times with 24 but 0.95
# with 8; at 4096 0.93 with 8.
_MIN_BATCH = ((1024, 2), (2560, 16))

_GRAM_METHODS: dict[str, tuple[torch.dtype, float]] = {
    "gram32": (torch.float32, FP32_GRAM_RANGE),
    "gram64": (torch.float64, FP64_GRAM_RANGE),
}
# Largest relative difference between the sum of the eigenvalues, the trace of the Gram matrix and
# the squared Frobenius norm of the weight. Rounding causes 2e-7 in fp32 and 1.3e-13 in fp64 (CPU,
# 600 to 1024 eigenvalues, Gaussian, heavy-tailed and of nearly rank one). Another matrix of the
# same shape and distribution differs by sqrt(2 / elements), 1.4e-3 at 1024x1024.
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-10}

# Results of the checks of a matrix in a batch.
_GOOD, _NEXT_METHOD, _NOT_FINITE, _WRONG = range(4)
# A batch whose solver failed. Its matrices are solved one by one.
_UNSOLVED = -1
_REASONS = {
    _NOT_FINITE: "values that are not finite",
    _WRONG: "eigenvalues that do not add up to the squared Frobenius norm",
}


def memory_of(size: int, dtype: torch.dtype) -> int:
    """Bytes that a matrix of `size` eigenvalues needs in a batch, in addition to its weight."""
    return int(_GRAMS_PER_MATRIX * size * size * dtype.itemsize)


def gram_dtype(size: int, *, full: bool) -> torch.dtype:
    """Dtype of the first Gram matrix that is computed for a matrix of `size` eigenvalues."""
    return torch.float64 if full or size <= SMALL else torch.float32


def batch_size(size: int, count: int, dtype: torch.dtype, memory: float, device: str) -> int:
    """How many of `count` matrices are solved at once; 1 if a batch is not faster.

    Depends only on the arguments, never on free memory, so a resumed run uses the same batches.

    Args:
        size: eigenvalues of each matrix.
        count: matrices.
        dtype: of the Gram matrices.
        memory: bytes that a batch may take. A single matrix may exceed it.
        device: type of the device. On a CPU, a solver uses all cores for one matrix, so a batch is
            not faster.
    """
    if device != "cuda":
        return 1
    smallest = next((few for limit, few in _MIN_BATCH if size <= limit), None)
    if smallest is None:
        return 1
    largest = min(int(memory / memory_of(size, dtype)), _MAX_ELEMENTS // (size * size))
    if min(largest, count) < smallest:
        return 1
    # Batches of equal size, since a small last one would be less efficient.
    return -(-count // -(-count // largest))


def eigenvalues_in_batches(
    weights: Sequence[torch.Tensor],
    *,
    full: bool = False,
    memory: float = 4e9,
    names: Sequence[str] | None = None,
    solve_one: Callable[[int], Spectrum] | None = None,
    size_of_batch: int | None = None,
) -> list[Spectrum]:
    """Squared singular values of matrices of any shapes.

    A matrix whose result fails a check is solved again individually and named in a warning.

    Args:
        weights: [rows, columns] each, any float dtype, on one device.
        full: whether the small eigenvalues are needed too, as in `eigenvalues_of`.
        memory: bytes that a batch may take in addition to the weights.
        names: names of the matrices for warnings.
        solve_one: solves the matrix of an index individually. Default: `eigenvalues_of`.
        size_of_batch: number of matrices solved at once, instead of `batch_size`.

    Returns:
        The result of `eigenvalues_of` for each matrix.

    Raises:
        ValueError: if one is not a matrix of real floating-point values in memory.
        RuntimeError: if memory ran out for a single matrix, or the device is lost.
    """
    plain = [plain_matrix(weight) for weight in weights]
    names = names or [f"matrix {index}" for index in range(len(weights))]
    solve_one = solve_one or (lambda index: eigenvalues_of(plain[index], full=full))
    by_size: dict[int, list[int]] = defaultdict(list)
    for index, weight in enumerate(plain):
        by_size[min(weight.shape)].append(index)
    spectra: dict[int, Spectrum] = {}
    for size, members in by_size.items():
        remaining = members
        for method, (dtype, allowed_range) in _GRAM_METHODS.items():
            if method == "gram32" and gram_dtype(size, full=full) != torch.float32:
                continue
            count = size_of_batch or batch_size(
                size, len(remaining), dtype, memory, plain[remaining[0]].device.type
            )
            if count == 1 and size_of_batch is None:
                break
            solve = partial(_solve_stack, dtype=dtype, allowed_range=allowed_range)
            solved = _solve_batches(plain, remaining, count, solve, names)
            remaining = []
            for index, (values, check) in solved.items():
                if check == _GOOD:
                    spectra[index] = values, method
                elif check == _NEXT_METHOD:
                    remaining.append(index)
                elif check in _REASONS:
                    logger.warning(
                        "megatron_llr: %s: %s in a batch; it is solved individually",
                        names[index],
                        _REASONS[check],
                    )
            if not remaining:
                break
    return [spectra[index] if index in spectra else solve_one(index) for index in range(len(plain))]


CheckedValues = tuple[torch.Tensor, int]
"""[N] fp64 eigenvalues, and the result of their checks."""


def _solve_batches(
    weights: Sequence[torch.Tensor],
    members: Sequence[int],
    count: int,
    solve: Callable[[Sequence[torch.Tensor]], list[CheckedValues]],
    names: Sequence[str],
) -> dict[int, CheckedValues]:
    """Solve `count` matrices at a time.

    The batches are halved if memory runs out. A batch whose solver fails is left unsolved.
    """
    solved: dict[int, CheckedValues] = {}
    first = 0
    while first < len(members):
        batch = members[first : first + count]
        result: list[CheckedValues] | None = None
        reason, out_of_memory = "", False
        try:
            result = solve([weights[index] for index in batch])
        except RuntimeError as error:
            # The memory of the failed attempt is released at the end of this block.
            reason = f"{type(error).__name__}: {first_line(error)}"
            out_of_memory = isinstance(error, torch.OutOfMemoryError) or "ALLOC_FAILED" in str(
                error
            )
            if not out_of_memory and not is_solver_failure(error):
                raise
        if result is not None:
            solved.update(zip(batch, result, strict=True))
            first += len(batch)
            continue
        members_text = names[batch[0]] + (f" and {len(batch) - 1} more" if len(batch) > 1 else "")
        if out_of_memory and len(batch) > 1:
            count = -(-len(batch) // 2)
            remedy = f"batches of {count} from here on"
            if weights[batch[0]].is_cuda:
                torch.cuda.empty_cache()
        else:
            no_values = torch.empty(0, dtype=torch.float64)
            solved.update((index, (no_values, _UNSOLVED)) for index in batch)
            first += len(batch)
            remedy = "they are solved one by one"
        logger.warning("megatron_llr: a batch (%s) failed: %s; %s", members_text, reason, remedy)
    return solved


def solve_grams(gram: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """[B, N] eigenvalues, and [B] whether a matrix failed to converge, if the solver reports it."""
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
) -> list[CheckedValues]:
    """Eigenvalues of matrices of equal smaller side, and the results of their checks.

    All checks run on the device. Their results are copied once. That is the only synchronization
    except the solver's own (torch's waits for its error codes).
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
        # No element of a Gram matrix exceeds its trace, so the trace shows whether all are finite.
        # A matrix that is not finite could make the solver fail for the whole batch.
        gram.masked_fill_(~finite[:, None, None], 0.0)
        values, failed = solve_grams(gram)
        values = values.double()
        sums = values.sum(1)
        allowed = TOLERANCE[dtype]
        # False for NaN.
        right = ((sums - traces).abs() <= allowed * traces) & (values.diff() >= 0).all(1)
        # Squares of small weights may underflow. A wider dtype avoids that.
        accurate = (traces - norms).abs() <= allowed * norms
        values = values.clamp_min(0.0)
        good = accurate & is_tail_accurate(values, allowed_range)
        checks = torch.where(good, _GOOD, _NEXT_METHOD)
        checks = torch.where(right, checks, _WRONG)
        if failed is not None:
            checks = torch.where(failed, _WRONG, checks)
        checks = torch.where(finite, checks, _NOT_FINITE)
    return list(zip(values.unbind(), checks.tolist(), strict=True))
