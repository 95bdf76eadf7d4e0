"""Eigenvalues of WᵀW for one matrix, by the cheapest method that is accurate enough.

Shapes: `R` rows, `C` columns, `N` = min(R, C) eigenvalues.
"""

import contextlib
import logging
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch

from megatron_llr.errors import first_line

logger = logging.getLogger(__name__)

_SolverError: type[RuntimeError] = torch.linalg.LinAlgError  # type: ignore[attr-defined]
# Prefixes of torch's errors from a GPU's solver libraries (cusolver, hipsolver, magma), which are
# either LinAlgErrors or plain RuntimeErrors.
_GPU_SOLVERS = ("solver error", "magma")

# Largest ratio of lambda_max to the tail start at which an fp32 Gram matrix is accurate:
# alpha_hill_median is off by 1e-4 at a ratio of singular values of 370 (measured).
FP32_GRAM_RANGE = 1e4
# The same for an fp64 Gram matrix. Above it only a singular value decomposition is accurate.
FP64_GRAM_RANGE = 1e12
# Up to this many eigenvalues fp64 costs almost nothing. It avoids a miscount of tiny singular
# values in the entropy: one too many in 96 changes it by 2e-3 (measured), in 1024 by 1e-4
# (1 / n ln n).
SMALL = 512


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Matrix products in the dtype of their factors, without TF32 and autocast.

    The 10-bit mantissa of TF32 and the 7 bits of bf16 would change the exponents.
    """
    mkldnn: Any = torch.backends.mkldnn
    backends = [torch.backends.cuda.matmul, getattr(mkldnn, "matmul", None)]
    settings: list[tuple[Any, str, Any]]
    if all(hasattr(backend, "fp32_precision") for backend in backends):
        # Once these have been set, torch refuses to read the older name below.
        settings = [(backend, "fp32_precision", "ieee") for backend in backends]
    else:
        settings = [(torch.backends.cuda.matmul, "allow_tf32", False)]
    before = [getattr(backend, name) for backend, name, _ in settings]
    try:
        for backend, name, exact in settings:
            setattr(backend, name, exact)
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            yield
    finally:
        for (backend, name, _), value in zip(settings, before, strict=True):
            setattr(backend, name, value)


def plain_matrix(weight: torch.Tensor) -> torch.Tensor:
    """A weight as a plain tensor that solvers accept.

    Returns:
        [R, C] detached, strided, of the dtype and device of `weight`. A dtype of 8 bits becomes
        fp32; a quantized tensor is dequantized.

    Raises:
        ValueError: if `weight` is not a matrix of real floating-point values in memory.
    """
    if not isinstance(weight, torch.Tensor):
        raise ValueError(f"expected a matrix, got {type(weight).__name__}")
    weight = weight.detach()
    kind = type(weight)
    if weight.is_quantized or kind.dequantize is not torch.Tensor.dequantize:
        weight = weight.dequantize()
        kind = type(weight)
    if kind.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        # A subclass that stores its values elsewhere, such as a DTensor.
        raise ValueError(f"expected a matrix as a plain tensor, got {kind.__name__}")
    if weight.layout != torch.strided or weight.is_nested:
        raise ValueError(f"expected a dense matrix, got layout {weight.layout}")
    if weight.ndim != 2 or 0 in weight.shape:
        raise ValueError(f"expected a matrix, got a tensor of shape {tuple(weight.shape)}")
    if not weight.is_floating_point():
        raise ValueError(f"expected a matrix of a float dtype, got {weight.dtype}")
    if weight.device.type == "meta":
        raise ValueError("expected a matrix with values, got one on the meta device")
    weight = weight.as_subclass(torch.Tensor)
    if weight.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        return weight
    try:
        return weight.float()
    except (RuntimeError, NotImplementedError) as error:
        raise ValueError(f"expected a matrix of a float dtype, got {weight.dtype}") from error


def _gram_eigenvalues(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    matrix = weight.to(dtype)
    rows, columns = matrix.shape
    gram = matrix @ matrix.T if rows <= columns else matrix.T @ matrix
    eigenvalues: torch.Tensor = torch.linalg.eigvalsh(gram)
    return eigenvalues.clamp_min(0.0).double()


def _squared_singular_values(weight: torch.Tensor) -> torch.Tensor:
    values: torch.Tensor = torch.linalg.svdvals(weight.double()).flip(0)
    # A smaller singular value is rounding error: the matrix has a lower rank.
    rounding = values.numel() * torch.finfo(values.dtype).eps * values[-1]
    # NaN does not compare as smaller, so a solver that returned NaN is still detected.
    return values.masked_fill(values <= rounding, 0.0).square()


# Methods in the order in which they are tried: the range in which each is accurate, and the solver.
_METHODS: dict[str, tuple[float, Callable[[torch.Tensor], torch.Tensor]]] = {
    "gram32": (FP32_GRAM_RANGE, lambda weight: _gram_eigenvalues(weight, torch.float32)),
    "gram64": (FP64_GRAM_RANGE, lambda weight: _gram_eigenvalues(weight, torch.float64)),
    "svd64": (math.inf, _squared_singular_values),
}


def is_tail_accurate(eigenvalues: torch.Tensor, allowed_range: float) -> torch.Tensor:
    """Whether the upper half of each spectrum is above rounding error; [..., N] -> [...] bool."""
    tail_start, largest = eigenvalues[..., eigenvalues.shape[-1] // 2], eigenvalues[..., -1]
    # The largest is zero if the products of small weights underflow.
    return (largest > 0) & (largest <= allowed_range * tail_start)


def is_solver_failure(error: RuntimeError) -> bool:
    """Whether a solver failed on this matrix, so that another may succeed.

    False for errors that affect every solver: no memory, a lost device.
    """
    if isinstance(error, _SolverError):
        return True
    text = str(error)
    return any(name in text.lower() for name in _GPU_SOLVERS) and "ALLOC_FAILED" not in text


def _try_method(method: str, weight: torch.Tensor) -> torch.Tensor | None:
    """[N] finite eigenvalues, or None if the solver failed."""
    _, solve = _METHODS[method]
    try:
        with full_precision():
            eigenvalues = solve(weight)
    except RuntimeError as error:
        if not is_solver_failure(error):
            raise
        reason = f"{type(error).__name__}: {first_line(error)}"
    else:
        # A solver on a GPU may return NaN where one on the CPU raises.
        if torch.isfinite(eigenvalues).all():
            return eigenvalues
        reason = "eigenvalues that are not finite"
    shape = "x".join(map(str, weight.shape))
    logger.warning("megatron_llr: %s of a matrix of %s failed: %s", method, shape, reason)
    return None


@torch.no_grad()
def eigenvalues_of(weight: torch.Tensor, *, full: bool = False) -> tuple[torch.Tensor, str]:
    """Squared singular values of a matrix.

    The methods are an fp32 Gram matrix, an fp64 Gram matrix, and singular values in fp64. The next
    one is used if the solver raises or returns values that are not finite, or if the spectrum
    exceeds the range in which the method is accurate.

    Args:
        weight: [R, C], any float dtype, any device.
        full: whether the small eigenvalues are needed too (searched fits). The fp32 Gram matrix is
            then skipped.

    Returns:
        [N] fp64 eigenvalues of WᵀW, ascending, not divided by R, on the device of `weight`, and the
        method (`SpectrumRecord.method`). All NaN and `failed` if the weight is not finite or every
        solver failed.

    Raises:
        ValueError: if `weight` is not a matrix of real floating-point values in memory.
        RuntimeError: if memory ran out or the device is lost.
    """
    weight = plain_matrix(weight)
    full = full or min(weight.shape) <= SMALL
    if torch.isfinite(weight).all():
        for method, (allowed_range, _) in _METHODS.items():
            if full and method == "gram32":
                continue
            eigenvalues = _try_method(method, weight)
            if eigenvalues is not None and (
                allowed_range == math.inf or is_tail_accurate(eigenvalues, allowed_range)
            ):
                return eigenvalues, method
    no_values = torch.full(
        (min(weight.shape),), torch.nan, dtype=torch.float64, device=weight.device
    )
    return no_values, "failed"
