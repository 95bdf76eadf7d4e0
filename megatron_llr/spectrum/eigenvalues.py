"""Eigenvalues of WᵀW for one matrix, as cheaply as the wanted exponents allow.

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
# How torch begins the errors of a GPU's solver libraries (cusolver, hipsolver, magma), which reach
# Python as plain RuntimeErrors where they are no LinAlgError.
_GPU_SOLVERS = ("solver error", "magma")

# Where lambda_max exceeds the tail start by more than this, an fp32 Gram matrix no longer holds the
# tail: alpha_hill_median is off by 1e-4 at a ratio of singular values of 370 (measured).
FP32_GRAM_RANGE = 1e4
# The same for an fp64 Gram matrix: beyond it only a singular value decomposition keeps the tail.
FP64_GRAM_RANGE = 1e12
# Up to this many eigenvalues fp64 costs next to nothing, and spares the entropy a miscount of tiny
# singular values: one too many in 96 is 2e-3 of it (measured), in 1024 1e-4 (1 / n ln n).
SMALL = 512


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Matrix products in the dtype of their factors: neither TF32 nor autocast.

    The 10-bit mantissa of TF32 would show in the exponents, and the 7 bits of bf16 all the more.
    """
    mkldnn: Any = torch.backends.mkldnn
    backends = [torch.backends.cuda.matmul, getattr(mkldnn, "matmul", None)]
    settings: list[tuple[Any, str, Any]]
    if all(hasattr(backend, "fp32_precision") for backend in backends):
        # Where it was set by these names, torch refuses to answer by the older one below.
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
    """A matrix that solvers understand.

    Returns:
        [R, C] detached, strided, of the dtype and device of `weight`; fp32 where the dtype is one
        of 8 bits, and the values of a quantized tensor.

    Raises:
        ValueError: if `weight` is not a matrix of real floating-point values that lie in memory.
    """
    if not isinstance(weight, torch.Tensor):
        raise ValueError(f"expected a matrix, got {type(weight).__name__}")
    weight = weight.detach()
    kind = type(weight)
    if weight.is_quantized or kind.dequantize is not torch.Tensor.dequantize:
        weight = weight.dequantize()
        kind = type(weight)
    if kind.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        # What holds its values elsewhere, as a DTensor does.
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
    # Below this a singular value is rounding alone: the matrix has a lower rank.
    rounding = values.numel() * torch.finfo(values.dtype).eps * values[-1]
    # NaN is not below it, so that a solver which gave NaN is found out.
    return values.masked_fill(values <= rounding, 0.0).square()


# Ways to the eigenvalues in the order in which they are tried: the range that each holds, itself.
_METHODS: dict[str, tuple[float, Callable[[torch.Tensor], torch.Tensor]]] = {
    "gram32": (FP32_GRAM_RANGE, lambda weight: _gram_eigenvalues(weight, torch.float32)),
    "gram64": (FP64_GRAM_RANGE, lambda weight: _gram_eigenvalues(weight, torch.float64)),
    "svd64": (math.inf, _squared_singular_values),
}


def stands_clear(eigenvalues: torch.Tensor, allowed_range: float) -> torch.Tensor:
    """Whether the upper half of each spectrum stands clear of rounding; [..., N] -> [...] bool."""
    tail_start, largest = eigenvalues[..., eigenvalues.shape[-1] // 2], eigenvalues[..., -1]
    # The largest is zero where the products of small weights underflow.
    return (largest > 0) & (largest <= allowed_range * tail_start)


def _holds(eigenvalues: torch.Tensor, allowed_range: float) -> bool:
    return allowed_range == math.inf or bool(stands_clear(eigenvalues, allowed_range))


def is_solvers(error: RuntimeError) -> bool:
    """Whether a solver gave up on this matrix; all else (no memory, a dead GPU) is no reason to go
    on.
    """
    if isinstance(error, _SolverError):
        return True
    text = str(error)
    return any(name in text.lower() for name in _GPU_SOLVERS) and "ALLOC_FAILED" not in text


def _attempt(method: str, weight: torch.Tensor) -> torch.Tensor | None:
    """[N] finite eigenvalues, or None where the solver failed."""
    _, solve = _METHODS[method]
    try:
        with full_precision():
            eigenvalues = solve(weight)
    except RuntimeError as error:
        if not is_solvers(error):
            raise
        reason = f"{type(error).__name__}: {first_line(error)}"
    else:
        # A GPU's solver may give NaN where that of a CPU raises.
        if torch.isfinite(eigenvalues).all():
            return eigenvalues
        reason = "eigenvalues that are not finite"
    shape = "x".join(map(str, weight.shape))
    logger.warning("megatron_llr: %s of a matrix of %s failed: %s", method, shape, reason)
    return None


@torch.no_grad()
def eigenvalues_of(weight: torch.Tensor, *, full: bool = False) -> tuple[torch.Tensor, str]:
    """Squared singular values of a matrix.

    Where a solver fails (it raises, or gives values that are not finite) the next more careful one
    is asked: fp32 Gram matrix, fp64 Gram matrix, singular values in fp64.

    Args:
        weight: [R, C], any float dtype, any device.
        full: whether the small eigenvalues are needed too (searching fits); then the Gram matrix is
            formed in fp64 from the start.

    Returns:
        [N] fp64 eigenvalues of WᵀW, ascending, not divided by R, on the device of `weight`; and how
        they were got (`SpectrumRecord.method`). All NaN, with `failed`, where the weight
        is not finite or every solver gave up.

    Raises:
        ValueError: if `weight` is not a matrix of real floating-point values that lie in memory.
        RuntimeError: where no other solver could help: memory ran out, the device is lost.
    """
    weight = plain_matrix(weight)
    full = full or min(weight.shape) <= SMALL
    if torch.isfinite(weight).all():
        for method, (allowed_range, _) in _METHODS.items():
            if full and method == "gram32":
                continue
            eigenvalues = _attempt(method, weight)
            if eigenvalues is not None and _holds(eigenvalues, allowed_range):
                return eigenvalues, method
    nothing = torch.full((min(weight.shape),), torch.nan, dtype=torch.float64, device=weight.device)
    return nothing, "failed"
