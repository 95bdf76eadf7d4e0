"""The expected exponent of a random matrix of a shape, against matrices that are really drawn."""

import math
import statistics

import pytest
import torch

from megatron_llr.spectrum import analyze_matrix
from megatron_llr.spectrum.random_shape import random_exponent

# Square and fused attention, MLP at 8/3 and 4, experts, 8:1, both orientations, odd sides.
SHAPES = (
    (64, 64),
    (96, 96),
    (128, 128),
    (50, 200),
    (64, 128),
    (128, 64),
    (64, 172),
    (171, 64),
    (64, 512),
    (512, 64),
    (192, 256),
)


def exponents(rows: int, columns: int, draws: int) -> list[float]:
    generator = torch.Generator().manual_seed(rows * 1000 + columns)
    return [
        # The scale does not matter.
        analyze_matrix(0.02 * torch.randn(rows, columns, generator=generator)).alpha_hill_median
        for _ in range(draws)
    ]


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_the_mean_of_real_draws_is_within_one_percent(rows: int, columns: int) -> None:
    drawn = exponents(rows, columns, 120)
    assert random_exponent(rows, columns) == pytest.approx(statistics.mean(drawn), rel=0.01)


@pytest.mark.parametrize(
    ("rows", "columns", "deviation"),
    [(64, 64, 0.025), (512, 512, 0.004), (512, 1024, 0.004)],
)
def test_a_single_matrix_is_within_three_deviations(
    rows: int, columns: int, deviation: float
) -> None:
    (drawn,) = exponents(rows, columns, 1)
    assert random_exponent(rows, columns) == pytest.approx(drawn, rel=3 * deviation)


@pytest.mark.parametrize(("ratio", "limit"), [(1, 2.12168), (2, 2.70584), (8, 4.46992)])
def test_large_matrices_are_represented_by_smaller_ones_of_their_aspect_ratio(
    ratio: int, limit: float
) -> None:
    """The limit of many eigenvalues, from the Marchenko-Pastur density by numerical integration."""
    exponent = random_exponent(4096, 4096 * ratio)
    assert exponent == random_exponent(512 * ratio, 512)
    assert exponent == pytest.approx(limit, rel=5e-3)


def test_the_shape_of_an_embedding_has_an_exponent() -> None:
    assert math.isfinite(random_exponent(32000, 768))
