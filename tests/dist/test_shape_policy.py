"""The policies `shape` and `role-mean` and factors of roles on Megatron's loop."""

import pytest
import torch.distributed as dist
from harness import Run, train

from megatron_llr.matrices.ids import EMBEDDING_IDS, MatrixId
from megatron_llr.ranks import gather_objects
from megatron_llr.spectrum.random_shape import random_exponent

pytestmark = pytest.mark.world_size(1, 2)

LAYOUTS = {1: "", 2: "--tensor-model-parallel-size 2"}


def first_multipliers(*flags: str) -> tuple[dict[MatrixId, float], dict[MatrixId, tuple[int, int]]]:
    """Multipliers before the first update, the same on every rank, and the matrices' shapes."""
    seen: dict[MatrixId, float] = {}
    shapes: dict[MatrixId, tuple[int, int]] = {}

    def note(run: Run, update: int, done: bool) -> None:
        if update == 1 and not done:
            seen.update(run.controller.multipliers)
            index = run.controller.matrix_index
            shapes.update({m: (info.rows, info.columns) for m, info in index.items()})

    train(LAYOUTS[dist.get_world_size()], *flags, on_update=note)
    every = gather_objects(seen)
    assert all(each == every[0] for each in every)
    return seen, shapes


def test_multipliers_of_shape_follow_from_the_shapes_only() -> None:
    multipliers, shapes = first_multipliers("--llr-policy shape")
    inside = {m: random_exponent(*shapes[m]) for m in multipliers if m not in EMBEDDING_IDS}
    low, high = min(inside.values()), max(inside.values())
    assert high > low
    for matrix, exponent in inside.items():
        expected = 1 + 4 * (exponent - low) / (high - low)
        assert multipliers[matrix] == pytest.approx(expected)
    assert multipliers["embedding"] == 5.0


def test_multipliers_of_role_mean_are_equal_in_all_blocks() -> None:
    multipliers, _ = first_multipliers(
        "--llr-policy role-mean --llr-mean-preserving --llr-role-factors q=0.7"
    )
    inside = {m: v for m, v in multipliers.items() if m not in EMBEDDING_IDS}
    by_role: dict[str, set[float]] = {}
    for matrix, value in inside.items():
        by_role.setdefault(matrix.role, set()).add(value)
    assert {len(values) for values in by_role.values()} == {1}
    assert len({next(iter(values)) for values in by_role.values()}) > 2
    unscaled = [value / (0.7 if m.role == "q" else 1.0) for m, value in inside.items()]
    assert sum(unscaled) / len(unscaled) == pytest.approx(1.0)
