"""Eigenvalues of WᵀW for one matrix, as cheaply as the wanted exponents allow.

Shapes: `R` rows, `C` columns, `N` = min(R, C) eigenvalues.
"""

import contextlib
from collections.abc import Iterator

import torch

_SolverError: type[RuntimeError] = torch.linalg.LinAlgError  # type: ignore[attr-defined]

# Where lambda_max exceeds the tail start by more than this, an fp32 Gram matrix no longer holds the
# tail: alpha_hill_median is off by 1e-4 at a ratio of singular values of 370 (measured).
FP32_GRAM_RANGE = 1e4
# The same for an fp64 Gram matrix: beyond it only a singular value decomposition keeps the tail.
FP64_GRAM_RANGE = 1e12
# Up to this many eigenvalues fp64 costs next to nothing, and spares the entropy a miscount of tiny
# singular values: one too many in 96 is 2e-3 of it (measured), in 1024 1e-4 (1 / n ln n).
SMALL = 512


@contextlib.contextmanager
def _full_precision_products() -> Iterator[None]:
    """Matrix products without TF32: its 10-bit mantissa would show in the exponents."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _gram_eigenvalues(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    matrix = weight.to(dtype)
    rows, columns = matrix.shape
    gram = matrix @ matrix.T if rows <= columns else matrix.T @ matrix
    eigenvalues: torch.Tensor = torch.linalg.eigvalsh(gram)
    return eigenvalues.clamp_min(0.0)


def _holds(eigenvalues: torch.Tensor, allowed_range: float) -> bool:
    """Whether the upper half of the spectrum stands clear of rounding."""
    tail_start = eigenvalues[eigenvalues.numel() // 2]
    return bool(eigenvalues[-1] <= allowed_range * tail_start)


@torch.no_grad()
def eigenvalues_of(weight: torch.Tensor, *, full: bool = False) -> tuple[torch.Tensor, str]:
    """Squared singular values of a matrix.

    Args:
        weight: [R, C], any float dtype, any device.
        full: whether the small eigenvalues are needed too (searching fits); then the Gram matrix is
            formed in fp64 from the start.

    Returns:
        [N] fp64 eigenvalues of WᵀW, ascending, not divided by R, on the device of `weight`; and how
        they were got (`SpectrumRecord.method`). All NaN, with `failed`, where the weight
        is not finite or every solver gave up.

    Raises:
        ValueError: if `weight` is not a matrix.
    """
    if weight.ndim != 2 or 0 in weight.shape:
        raise ValueError(f"expected a matrix, got a tensor of shape {tuple(weight.shape)}")
    weight = weight.detach()
    full = full or min(weight.shape) <= SMALL
    if torch.isfinite(weight).all():
        for method, allowed_range in (("gram32", FP32_GRAM_RANGE), ("gram64", FP64_GRAM_RANGE)):
            if full and method == "gram32":
                continue
            with contextlib.suppress(_SolverError), _full_precision_products():
                dtype = torch.float32 if method == "gram32" else torch.float64
                eigenvalues = _gram_eigenvalues(weight, dtype)
                if _holds(eigenvalues, allowed_range) and torch.isfinite(eigenvalues).all():
                    return eigenvalues.double(), method
        with contextlib.suppress(_SolverError):
            values = torch.linalg.svdvals(weight.double()).flip(0)
            # Below this a singular value is rounding alone: the matrix has a lower rank.
            rounding = values.numel() * torch.finfo(values.dtype).eps * values[-1]
            return torch.where(values > rounding, values, 0.0).square(), "svd64"
    nothing = torch.full((min(weight.shape),), torch.nan, dtype=torch.float64, device=weight.device)
    return nothing, "failed"
