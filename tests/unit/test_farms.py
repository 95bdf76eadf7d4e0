"""FARMS: the windows of the authors' code, and no bias by aspect ratio."""

import pytest
import torch

from megatron_llr.spectrum import record_from_eigenvalues
from megatron_llr.spectrum.eigenvalues import eigenvalues_of
from megatron_llr.spectrum.farms import farms_eigenvalues, window_starts


def gaussian(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows + columns))


@pytest.mark.parametrize(
    ("length", "size", "windows", "expected"),
    [
        # LLM_Pruning/lib/sampling.py, fixed_sampling: step = max(1, (length - size) // (n - 1)).
        (128, 128, 10, [0]),
        (256, 128, 3, [0, 64, 128]),
        (130, 128, 10, [0, 1, 2]),
        (300, 100, 4, [0, 66, 132, 198]),
        (300, 100, 1, [0]),
    ],
)
def test_windows(length: int, size: int, windows: int, expected: list[int]) -> None:
    assert window_starts(length, size, windows) == expected


def test_eigenvalues_are_those_of_the_submatrices() -> None:
    weight = gaussian(96, 224)
    pooled, method = farms_eigenvalues(weight, 2000, 3)
    assert method == "farms"
    expected = torch.cat(
        [torch.linalg.svdvals(weight[:, a : a + 96].double()) ** 2 for a in (0, 64, 128)]
    )
    assert torch.allclose(pooled, expected.sort().values, rtol=1e-9)
    square, _ = farms_eigenvalues(gaussian(96, 96), 2000, 10)
    assert torch.equal(square, eigenvalues_of(gaussian(96, 96))[0])
    assert farms_eigenvalues(gaussian(96, 96), 64, 3)[0].numel() == 9 * 64


def test_a_matrix_that_is_not_finite_has_no_spectrum() -> None:
    weight = gaussian(64, 200)
    weight[3, 199] = torch.inf
    pooled, method = farms_eigenvalues(weight, 64, 5)
    assert method == "failed"
    assert pooled.isnan().all()


def test_random_matrices_of_any_shape_get_about_the_same_exponent() -> None:
    """The exponents of a 4:1 and a square matrix differ by 1.4, of their submatrices by 0.1."""
    whole, pooled = [], []
    for shape in ((128, 128), (128, 256), (512, 128)):
        weight = gaussian(*shape)
        for exponents, eigenvalues in (
            (whole, eigenvalues_of(weight)[0]),
            (pooled, farms_eigenvalues(weight, 128, 5)[0]),
        ):
            record = record_from_eigenvalues(eigenvalues, method="farms")
            exponents.append(record.alpha_hill_median)
    assert max(whole) - min(whole) > 1.0
    assert max(pooled) - min(pooled) < 0.15
