"""analyze_matrix against plain code, and for degenerate and extreme spectra."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from megatron_llr import analyze_matrix
from tests.reference import llr as reference


def with_singular_values(values: torch.Tensor, rows: int, cols: int) -> torch.Tensor:
    """A matrix of the given singular values."""
    generator = torch.Generator().manual_seed(5)
    left = torch.linalg.qr(torch.randn(rows, len(values), generator=generator).double()).Q
    right = torch.linalg.qr(torch.randn(cols, len(values), generator=generator).double()).Q
    return (left * values.double()) @ right.T


@pytest.mark.parametrize("shape", [(64, 64), (64, 200), (200, 64), (700, 650)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_alpha_hill_median_is_the_reference(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    record = analyze_matrix(weight)
    assert record.alpha_hill_median == pytest.approx(reference.hill_median(weight), rel=1e-5)
    assert record.num_eigenvalues == min(shape)
    assert record.frobenius_norm == pytest.approx(float(weight.double().norm()), rel=1e-6)
    assert record.alpha_ks is record.alpha_fix_finger is None


@pytest.mark.parametrize(("ratio", "method"), [(10.0, "gram32"), (1e4, "gram64"), (1e8, "svd64")])
def test_a_wide_spectrum_is_solved_again_in_fp64(ratio: float, method: str) -> None:
    """sigma_max / sigma_median = ratio; the record has the method."""
    values = torch.linspace(1, 2, 600).double()
    values[-1] = ratio * float(values.median())
    weight = with_singular_values(values, 600, 640)
    record = analyze_matrix(weight)
    assert record.method == method
    assert record.alpha_hill_median == pytest.approx(reference.hill_median(weight), rel=1e-4)


def test_small_matrices_are_measured_in_fp64() -> None:
    assert analyze_matrix(torch.randn(64, 64)).method == "gram64"


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_weight_that_is_not_finite_has_no_exponent(bad: float) -> None:
    weight = torch.randn(64, 64)
    weight[3, 4] = bad
    record = analyze_matrix(weight, ("hill_median", "ks", "fix_finger"))
    assert math.isnan(record.alpha_hill_median)
    assert record.method == "failed"
    assert record.num_eigenvalues == 64


ORTHOGONAL = torch.linalg.qr(torch.randn(600, 600, generator=torch.Generator().manual_seed(2))).Q


@pytest.mark.parametrize(
    "weight", [torch.zeros(64, 64), torch.ones(64, 64), torch.eye(64), ORTHOGONAL]
)
def test_degenerate_spectra_have_no_exponent(weight: torch.Tensor) -> None:
    record = analyze_matrix(weight, ("hill_median", "ks", "fix_finger"))
    assert math.isnan(record.alpha_hill_median)


def does_not_converge(matrix: torch.Tensor) -> torch.Tensor:
    raise torch.linalg.LinAlgError("did not converge")


def gives_nan(matrix: torch.Tensor) -> torch.Tensor:
    return torch.full(matrix.shape[:1], math.nan, dtype=matrix.dtype)


def breaks_on_a_gpu(matrix: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("cusolver error: CUSOLVER_STATUS_INTERNAL_ERROR, when calling `syevd`")


@pytest.mark.parametrize("fails", [does_not_converge, gives_nan, breaks_on_a_gpu])
def test_the_next_solver_is_used_if_one_fails(
    fails: Callable[[torch.Tensor], torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    weight, tried, solve = torch.randn(600, 700), [], torch.linalg.eigvalsh

    def fails_in_fp32(gram: torch.Tensor) -> torch.Tensor:
        tried.append(gram.dtype)
        return fails(gram) if gram.dtype == torch.float32 else solve(gram)

    expected = reference.hill_median(weight)
    monkeypatch.setattr(torch.linalg, "eigvalsh", fails_in_fp32)
    record = analyze_matrix(weight)
    assert (tried, record.method) == ([torch.float32, torch.float64], "gram64")
    assert record.alpha_hill_median == pytest.approx(expected, rel=1e-6)
    assert "gram32 of a matrix of 600x700 failed: " in caplog.text
    monkeypatch.setattr(torch.linalg, "eigvalsh", fails)
    record = analyze_matrix(weight)
    assert record.method == "svd64"
    assert record.alpha_hill_median == pytest.approx(expected, rel=1e-6)
    monkeypatch.setattr(torch.linalg, "svdvals", fails)
    record = analyze_matrix(weight)
    assert (record.method, record.num_eigenvalues) == ("failed", 600)
    assert math.isnan(record.alpha_hill_median)
    assert math.isnan(record.frobenius_norm)


NO_MEMORY = "cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`"


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
        RuntimeError(NO_MEMORY),
    ],
)
def test_an_error_that_affects_every_solver_is_raised(
    error: RuntimeError, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(gram: torch.Tensor) -> torch.Tensor:
        raise error

    monkeypatch.setattr(torch.linalg, "eigvalsh", fails)
    with pytest.raises(type(error)) as caught:
        analyze_matrix(torch.randn(64, 64))
    assert caught.value is error


@pytest.mark.parametrize(("scale", "method"), [(1e25, "gram64"), (1e160, "failed")])
def test_weights_too_large_for_their_own_squares(scale: float, method: str) -> None:
    """Squares overflow in fp32, or in fp64 too."""
    weight = torch.randn(600, 600, generator=torch.Generator().manual_seed(1)).double()
    record = analyze_matrix(weight * scale)
    assert record.method == method
    if method == "gram64":
        assert record.alpha_hill_median == pytest.approx(reference.hill_median(weight), rel=1e-6)
    else:
        assert math.isnan(record.alpha_hill_median)


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="--llr-estimator"):
        analyze_matrix(torch.randn(8, 8), ("alpha",))
    with pytest.raises(ValueError, match="expected a matrix"):
        analyze_matrix(torch.randn(8))


def set_by_newer_name(backend: Any, precision: str) -> None:
    backend.fp32_precision = precision


@pytest.mark.parametrize(
    ("reduce", "ambient"),
    [
        (lambda: torch.set_float32_matmul_precision("high"), ("tf32", "tf32")),
        (lambda: set_by_newer_name(torch.backends.cuda.matmul, "tf32"), ("tf32", "none")),
        (lambda: set_by_newer_name(torch.backends.mkldnn.matmul, "bf16"), ("none", "bf16")),
        (lambda: set_by_newer_name(torch.backends, "tf32"), ("tf32", "tf32")),
    ],
    ids=["older", "cuda", "mkldnn", "all"],
)
def test_reduced_precision_does_not_reach_the_gram_matrix(
    reduce: Callable[[], None], ambient: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Set by torch's older name or by its newer ones, and restored afterwards."""

    def precisions() -> tuple[str, str]:
        backends = torch.backends
        return backends.cuda.matmul.fp32_precision, backends.mkldnn.matmul.fp32_precision

    inside = []
    solve = torch.linalg.eigvalsh

    def solver(matrix: torch.Tensor) -> torch.Tensor:
        inside.append(precisions())
        return solve(matrix)

    monkeypatch.setattr(torch.linalg, "eigvalsh", solver)
    try:
        reduce()
        assert analyze_matrix(torch.randn(600, 600)).method == "gram32"
        assert inside == [("ieee", "ieee")]
        assert precisions() == ambient
    finally:
        torch.backends.fp32_precision = "none"
        torch.set_float32_matmul_precision("highest")
        for backend in (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul):
            set_by_newer_name(backend, "none")


def test_weights_whose_products_underflow_are_not_zeros() -> None:
    weight = torch.randn(600, 700, generator=torch.Generator().manual_seed(0))
    small, usual = analyze_matrix(weight * 1e-24), analyze_matrix(weight)
    assert small.method != "gram32"
    assert small.alpha_hill_median == pytest.approx(usual.alpha_hill_median, rel=1e-4)
