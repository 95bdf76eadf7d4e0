"""analyze_matrix against plain code, and at the edges where spectra go wrong."""

import math

import pytest
import torch

from megatron_llr import analyze_matrix
from megatron_llr.spectrum import eigenvalues
from megatron_llr.spectrum.eigenvalues import eigenvalues_of
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
def test_a_wide_spectrum_is_redone_in_fp64(ratio: float, method: str) -> None:
    """sigma_max / sigma_median = ratio; the record says how its eigenvalues were got."""
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


@pytest.mark.parametrize("weight", [torch.zeros(64, 64), torch.ones(64, 64), torch.eye(64)])
def test_degenerate_spectra_have_no_exponent(weight: torch.Tensor) -> None:
    record = analyze_matrix(weight, ("hill_median", "ks", "fix_finger"))
    assert math.isnan(record.alpha_hill_median) or record.alpha_hill_median > 1e3


def test_a_solver_that_fails_is_followed_by_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, tried = torch.randn(600, 600), []

    def fails(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        tried.append(dtype)
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(eigenvalues, "_gram_eigenvalues", fails)
    found, method = eigenvalues_of(weight)
    assert tried == [torch.float32, torch.float64]
    assert method == "svd64"
    assert float(found[-1].sqrt()) == pytest.approx(float(torch.linalg.matrix_norm(weight, 2)))


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="--llr-estimator"):
        analyze_matrix(torch.randn(8, 8), ("alpha",))
    with pytest.raises(ValueError, match="expected a matrix"):
        analyze_matrix(torch.randn(8))


def test_tf32_does_not_reach_the_gram_matrix() -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        analyze_matrix(torch.randn(600, 600))
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
