"""Mappings, embedding policy, granularity: what happens at the edges of the golden cases."""

import math
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

import megatron_llr
from megatron_llr import LLRConfig, policies
from megatron_llr.config import Granularity, MappingName, ModelMapping
from megatron_llr.matrices.ids import MatrixId
from megatron_llr.matrices.info import MatrixIndex
from megatron_llr.policies import held_at_one, share_multipliers
from megatron_llr.policies.assign import WITHIN_BLOCK
from megatron_llr.policies.mappings import MAPPINGS
from megatron_llr.policy_table import POLICIES
from tests.reference.matrix_ids import by_id, info

ALPHAS = {"block.0.mlp.up": 2.0, "block.0.mlp.down": 3.0, "block.1.mlp.up": 4.0}


def assign_multipliers(alphas: dict[str, float], config: LLRConfig) -> dict[MatrixId, float]:
    return megatron_llr.assign_multipliers(by_id(alphas), config)


def targets_for(alphas: dict[str, float], config: LLRConfig) -> dict[MatrixId, float]:
    return policies.targets_for(by_id(alphas), config)


def test_linear_is_the_papers_map() -> None:
    assert assign_multipliers(ALPHAS, LLRConfig()) == {
        "block.0.mlp.up": 1.0,
        "block.0.mlp.down": 3.0,
        "block.1.mlp.up": 5.0,
    }


@pytest.mark.parametrize(("embedding", "expected"), [("max", 5.0), ("one", 1.0), ("2.5", 2.5)])
def test_embedding_and_head_follow_their_policy_and_stay_out_of_the_pool(
    embedding: str, expected: float
) -> None:
    alphas = {**ALPHAS, "embedding": 99.0, "head": math.nan}
    found = assign_multipliers(alphas, LLRConfig(embedding=embedding))
    assert found["embedding"] == found["head"] == expected
    assert found["block.0.mlp.down"] == 3.0


def test_a_measured_embedding_is_mapped_like_the_others_and_clipped() -> None:
    config = LLRConfig(embedding="measured")
    found = assign_multipliers({**ALPHAS, "embedding": 3.5, "head": 9.0}, config)
    assert (found["embedding"], found["head"]) == (4.0, 5.0)
    assert "head" not in assign_multipliers({**ALPHAS, "head": math.nan}, config)


def test_every_mapping_has_a_function_over_the_model_and_one_within_blocks() -> None:
    assert tuple(MAPPINGS) == get_args(ModelMapping)
    assert get_args(MappingName) == (*MAPPINGS, *(f"{WITHIN_BLOCK}{name}" for name in MAPPINGS))


@pytest.mark.parametrize("mapping", get_args(MappingName))
@pytest.mark.parametrize("inverse", [False, True])
@given(alphas=st.lists(st.floats(allow_nan=True, allow_infinity=True), min_size=0, max_size=9))
def test_no_exponent_gives_a_multiplier_that_is_not_finite(
    mapping: str, inverse: bool, alphas: list[float]
) -> None:
    named = {f"block.{i % 3}.mlp.m{i}": alpha for i, alpha in enumerate(alphas)}
    named["embedding"] = math.nan
    for value in assign_multipliers(named, LLRConfig(mapping=mapping, inverse=inverse)).values():
        assert math.isfinite(value)
        assert value > 0


def test_equal_or_missing_exponents_leave_a_matrix_out() -> None:
    assert assign_multipliers({"block.0.m": 2.0, "block.1.m": 2.0}, LLRConfig()) == {}
    found = assign_multipliers({**ALPHAS, "block.1.mlp.down": math.nan}, LLRConfig())
    assert "block.1.mlp.down" not in found
    assert found["block.1.mlp.up"] == 5.0


def test_quantiles_keep_an_outlier_from_stretching_the_scale() -> None:
    alphas = {f"block.{i}.mlp.up": 2 + 0.01 * i for i in range(20)} | {"block.20.mlp.up": 50.0}
    plain = assign_multipliers(alphas, LLRConfig())
    clipped = assign_multipliers(alphas, LLRConfig(mapping="quantile"))
    assert plain["block.19.mlp.up"] < 1.1
    assert clipped["block.19.mlp.up"] == clipped["block.20.mlp.up"] == 5.0


@pytest.mark.parametrize("mapping", get_args(MappingName))
def test_mean_preserving_multipliers_have_mean_1(mapping: str) -> None:
    alphas = {f"block.{i // 4}.mlp.m{i}": 2 + 0.1 * i * i for i in range(12)}
    config = LLRConfig(mapping=mapping, mean_preserving=True)
    found = assign_multipliers({**alphas, "embedding": math.nan}, config)
    assert sum(found[matrix] for matrix in alphas) / 12 == pytest.approx(1.0)
    assert min(found.values()) < 1


def test_bounds_below_1_are_allowed() -> None:
    config = LLRConfig(min_multiplier=0.5, max_multiplier=1.5)
    assert sorted(assign_multipliers(ALPHAS, config).values()) == [0.5, 1.0, 1.5]


def test_uniform_is_1_everywhere() -> None:
    assert set(targets_for(ALPHAS, LLRConfig(policy="uniform")).values()) == {1.0}


def test_a_role_table_gives_every_role_its_constant(tmp_path: Path) -> None:
    (tmp_path / "roles.json").write_text('{"up": 2.5, "head": 5}')
    config = LLRConfig(policy="fixed", role_table=str(tmp_path / "roles.json"))
    found = targets_for({**ALPHAS, "head": math.nan, "embedding": math.nan}, config)
    assert found == {
        "block.0.mlp.up": 2.5,
        "block.0.mlp.down": 1.0,
        "block.1.mlp.up": 2.5,
        "head": 5.0,
        "embedding": 1.0,
    }


@pytest.mark.parametrize(
    "text", ["", "[1]", '{"up": -1}', '{"up": "x"}', '{"upper": 1}', '{"up": NaN}', None]
)
def test_a_bad_role_table_is_named(text: str | None, tmp_path: Path) -> None:
    path = tmp_path / "roles.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=r"Cannot read --llr-role-table.*roles\.json"):
        targets_for(ALPHAS, LLRConfig(policy="fixed", role_table=str(path)))


@pytest.fixture
def matrix_index() -> MatrixIndex:
    found = [info("embedding", "embedding", 300)]
    for block in (0, 1):
        qkv = f"block.{block}.attention.qkv"
        found += [
            info(f"block.{block}.attention.q", qkv, 128),
            info(f"block.{block}.attention.k", qkv, 32),
            info(f"block.{block}.attention.v", qkv, 64),
            info(f"block.{block}.attention.o", f"block.{block}.attention.o", 128),
        ]
    return {entry.matrix: entry for entry in found}


def test_granularities_share_the_mean_weighted_by_size(matrix_index: MatrixIndex) -> None:
    targets = {matrix: 1.0 + index for index, matrix in enumerate(matrix_index)}
    at = {g: share_multipliers(targets, matrix_index, g) for g in get_args(Granularity)}
    assert at["projection"] == targets
    q, k, v, o = (f"block.0.attention.{role}" for role in "qkvo")
    mean = (targets[q] * 128 + targets[k] * 32 + targets[v] * 64) / 224
    assert at["parameter"][q] == at["parameter"][k] == at["parameter"][v] == pytest.approx(mean)
    assert at["parameter"][o] == targets[o]
    other = "block.1.attention.q"
    assert at["role"][q] == at["role"][other] == (targets[q] + targets[other]) / 2
    # 32 eigenvalues are too few: such a matrix takes no part, and stays as it is.
    assert at["role"][k] == at["block"][k] == targets[k]
    assert at["block"][q] == at["block"][o] != at["block"][other]
    assert all(found["embedding"] == targets["embedding"] for found in at.values())


def test_an_optimizer_that_cannot_step_parts_shares_whatever_the_granularity(
    matrix_index: MatrixIndex,
) -> None:
    targets = {matrix: 1.0 + index for index, matrix in enumerate(matrix_index)}
    fused = [matrix for matrix in matrix_index if matrix.startswith("block.0.attention.")]
    found = share_multipliers(targets, matrix_index, "projection", fused)
    whole = share_multipliers(targets, matrix_index, "parameter")
    assert [found[matrix] for matrix in fused] == [whole[matrix] for matrix in fused]
    assert found["block.1.attention.q"] == targets["block.1.attention.q"]


@pytest.mark.parametrize("granularity", ["role", "block"])
def test_a_role_or_a_block_leaves_no_parameter_with_two_multipliers_that_cannot_have_them(
    matrix_index: MatrixIndex, granularity: str
) -> None:
    """Also where a part is too small to be measured: k is."""
    targets = {matrix: 1.0 + index for index, matrix in enumerate(matrix_index)}
    fused = [matrix for matrix, info in matrix_index.items() if info.parameter_id.endswith("qkv")]
    shared = share_multipliers(targets, matrix_index, granularity)
    found = share_multipliers(targets, matrix_index, granularity, fused)
    for block in (0, 1):
        q, k, v, o = (f"block.{block}.attention.{role}" for role in "qkvo")
        mean = (shared[q] * 128 + shared[k] * 32 + shared[v] * 64) / 224
        assert found[q] == found[k] == found[v] == pytest.approx(mean)
        assert found[o] == shared[o]


ROUTER = "block.0.mlp.router"


@pytest.mark.parametrize("policy", sorted(set(POLICIES) - {"fixed"}))
def test_a_router_keeps_1_and_moves_no_other_matrix(policy: str) -> None:
    """Its exponent would be the largest; asked for, it is a matrix like any other."""
    config = LLRConfig(policy=policy)
    without = targets_for(ALPHAS, config)
    assert targets_for({**ALPHAS, ROUTER: 9.0}, config) == {**without, ROUTER: 1.0}
    asked = targets_for({**ALPHAS, ROUTER: 9.0}, LLRConfig(policy=policy, router="policy"))
    if policy in ("esd", "inverse"):
        assert asked[ROUTER] == (5.0 if policy == "esd" else 1.0)
        assert asked["block.1.mlp.up"] != without["block.1.mlp.up"]


def test_a_role_table_may_name_the_router_if_the_policy_may_set_it(tmp_path: Path) -> None:
    path = tmp_path / "roles.json"
    path.write_text('{"router": 0.5, "up": 2, "expert.up": 3}')
    alphas = {**ALPHAS, ROUTER: 9.0, "block.1.mlp.expert.7.up": 2.0}
    with pytest.raises(ValueError, match="Add --llr-router policy"):
        targets_for(alphas, LLRConfig(policy="fixed", role_table=str(path)))
    found = targets_for(alphas, LLRConfig(policy="fixed", role_table=str(path), router="policy"))
    assert found == {
        "block.0.mlp.up": 2.0,
        "block.0.mlp.down": 1.0,
        "block.1.mlp.up": 2.0,
        ROUTER: 0.5,
        "block.1.mlp.expert.7.up": 3.0,
    }


@pytest.mark.parametrize("granularity", ["role", "block"])
def test_what_is_held_at_1_takes_no_part_in_its_block(granularity: str) -> None:
    names = ["block.0.mlp.router", "block.1.mlp.router", "block.0.mlp.up", "block.1.mlp.up"]
    matrix_index = by_id({name: info(name, rows=128) for name in names})
    targets = dict(zip(matrix_index, (1.0, 1.0, 2.0, 4.0), strict=True))
    held = held_at_one(matrix_index, LLRConfig())
    assert held == set(names[:2])
    found = share_multipliers(targets, matrix_index, granularity, held=held)
    expected = (3.0, 3.0) if granularity == "role" else (2.0, 4.0)
    assert tuple(found.values()) == (1.0, 1.0, *expected)
    assert held_at_one(matrix_index, LLRConfig(router="policy")) == set()
