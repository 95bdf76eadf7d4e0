"""Every policy by name: what it gives, what it acts on, and a user's own."""

import math
import re
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from megatron_llr import LLRConfig, assign_multipliers, state
from megatron_llr.config import settings_of
from megatron_llr.matrices.ids import EMBEDDING_IDS, MatrixId
from megatron_llr.policies import acts_on, targets_for
from megatron_llr.policies.registry import load_policy
from megatron_llr.policy_table import POLICIES, summaries
from megatron_llr.schedule import MultiplierSchedule
from tests.reference.matrix_ids import by_id, info

ROLES = ("attention.q", "attention.k", "attention.v", "attention.o", "mlp.gate", "mlp.up")
BLOCKS = 5
ALPHAS = by_id(
    {
        "embedding": math.nan,
        **{
            f"block.{block}.{role}": 2.0 + 0.1 * block + 0.37 * index
            for block in range(BLOCKS)
            for index, role in enumerate((*ROLES, "mlp.down"))
        },
        "head": math.nan,
    }
)
INSIDE = [matrix for matrix in ALPHAS if matrix not in EMBEDDING_IDS]


def config(policy: str, **more: object) -> LLRConfig:
    table = {"role_table": "llr"} if policy == "fixed" else {}
    return LLRConfig(policy=policy, **{**table, **more})  # type: ignore[arg-type]


def mean(targets: Mapping[str, float]) -> float:
    return sum(targets[matrix] for matrix in INSIDE) / len(INSIDE)


@pytest.mark.parametrize("policy", POLICIES)
def test_every_row_is_a_documented_function_that_gives_every_matrix_a_multiplier(
    policy: str,
) -> None:
    assert "arXiv" in (load_policy(policy).__doc__ or "") or policy == "uniform"
    assert policy in summaries()
    found = targets_for(ALPHAS, config(policy))
    assert found.keys() == ALPHAS.keys()
    assert all(math.isfinite(value) and value > 0 for value in found.values())


@pytest.mark.parametrize("policy", sorted(name for name, row in POLICIES.items() if not row.mapped))
def test_a_policy_without_exponents_asks_for_none(policy: str) -> None:
    missing = dict.fromkeys(ALPHAS, math.nan)
    assert targets_for(missing, config(policy)) == targets_for(ALPHAS, config(policy))


@pytest.mark.parametrize("policy", sorted(set(POLICIES) - {"uniform", "embedding-only"}))
def test_mean_preserving_holds_the_mean_of_every_policy(policy: str) -> None:
    found = targets_for(ALPHAS, config(policy, mean_preserving=True))
    assert mean(found) == pytest.approx(1.0)
    assert max(found.values()) > min(found.values())


def test_the_embedding_alone() -> None:
    found = targets_for(ALPHAS, config("embedding-only", embedding="2.5"))
    assert found == {m: 2.5 if m in EMBEDDING_IDS else 1.0 for m in ALPHAS}


def test_the_constants_that_llr_converged_to() -> None:
    found = targets_for(ALPHAS, config("fixed"))
    assert found["block.3.attention.k"] == 1.24
    assert found["block.0.mlp.up"] == 2.7
    assert found["head"] == 5.0


def test_blockwise_ratios_are_those_of_the_paper() -> None:
    found = targets_for(ALPHAS, config("blockwise"))
    by_role = {m.rsplit(".", 1)[-1]: value for m, value in found.items()}
    assert by_role == {
        **{"q": 8, "k": 8, "v": 4, "o": 4, "gate": 6, "up": 6, "down": 6},
        **{"embedding": 10, "head": 10},
    }
    normalised = targets_for(ALPHAS, config("blockwise", mean_preserving=True))
    assert normalised["embedding"] / normalised["block.0.attention.v"] == pytest.approx(2.5)
    # An output gate of the attention is no feed-forward matrix.
    assert targets_for(by_id({"block.0.attention.gate": 2.0}), config("blockwise")) == {
        "block.0.attention.gate": 1.0
    }


@pytest.mark.parametrize(
    ("policy", "middle", "second"),
    [
        ("depth-linear", 0.55, 0.775),
        ("depth-exponential", 0.1**0.5, 0.1**0.25),
        ("depth-cosine", 0.55, 0.1 + 0.45 * (1 + math.cos(math.pi / 4))),
    ],
)
def test_depth_falls_from_the_embedding_to_the_head(
    policy: str, middle: float, second: float
) -> None:
    found = targets_for(ALPHAS, config(policy))
    by_block = [found[f"block.{block}.mlp.up"] for block in range(BLOCKS)]
    assert by_block[0] == found["embedding"] == 1.0
    assert by_block[-1] == found["head"] == pytest.approx(0.1)
    assert (by_block[1], by_block[2]) == (pytest.approx(second), pytest.approx(middle))
    assert by_block == sorted(by_block, reverse=True)
    turned = targets_for(ALPHAS, config(policy, inverse=True))
    assert [turned[f"block.{b}.mlp.up"] for b in range(BLOCKS)] == pytest.approx(by_block[::-1])
    assert turned["embedding"] == pytest.approx(0.1)
    floor = targets_for(ALPHAS, config(policy, depth_floor=0.5))
    assert min(floor.values()) == pytest.approx(0.5)
    assert targets_for(by_id({"block.0.mlp.up": 2.0}), config(policy)) == {"block.0.mlp.up": 1.0}


def test_depth_counts_blocks_not_layers() -> None:
    """In a hybrid model a mixer layer and the MLP after it are one block; mtp follows the last."""
    hybrid = ("block.0.mamba.in_proj", "block.1.attention.q", "block.1.mlp.up", "block.2.mlp.up")
    found = targets_for(
        by_id(dict.fromkeys(("position_embedding", *hybrid, "mtp.0.mlp.up"), 2.0)),
        config("depth-linear"),
    )
    assert list(found.values()) == pytest.approx([1.0, 1.0, 0.55, 0.55, 0.1, 0.1])


def test_random_permutes_the_multipliers_of_esd() -> None:
    esd = assign_multipliers(ALPHAS, LLRConfig())
    found = targets_for(ALPHAS, config("random"))
    assert sorted(found.values()) == sorted(esd.values())
    assert found["embedding"] == esd["embedding"] == 5.0
    moved = sum(found[matrix] != esd[matrix] for matrix in INSIDE)
    assert moved > len(INSIDE) // 2
    # The order in which the matrices are named does not count; the seed does.
    assert targets_for(dict(reversed(ALPHAS.items())), config("random")) == found
    assert targets_for(ALPHAS, config("random", random_seed=1)) != found


def test_inverse_is_esd_turned_round() -> None:
    assert targets_for(ALPHAS, config("inverse")) == assign_multipliers(
        ALPHAS, LLRConfig(inverse=True)
    )
    assert targets_for(ALPHAS, config("inverse", inverse=True)) == assign_multipliers(
        ALPHAS, LLRConfig()
    )


def test_alphadecay_acts_on_the_decay_and_leaves_the_embedding() -> None:
    assert acts_on("alphadecay") == "weight_decay"
    assert {acts_on(policy) for policy in set(POLICIES) - {"alphadecay"}} == {"learning_rate"}
    found = targets_for(ALPHAS, config("alphadecay", min_multiplier=0.6666, max_multiplier=3.0))
    assert found["embedding"] == found["head"] == 1.0
    assert min(found.values()) == pytest.approx(0.6666)
    assert found["block.4.mlp.down"] == pytest.approx(3.0)


@pytest.fixture
def own_policies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_policies.py").write_text(
        "def halves(alphas, config):\n    return {m: 0.5 for m in alphas if 'up' in m}\n"
        "halves.acts_on = 'weight_decay'\n"
        "def minus(alphas, config):\n    return {m: -1 for m in alphas}\n"
        "def strange(alphas, config):\n    return {'block.9.x': 1.0}\n"
        "def broken(alphas, config):\n    return alphas['nowhere']\n"
        "number = 3\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("own_policies", None)


@pytest.mark.usefixtures("own_policies")
def test_a_policy_of_ones_own() -> None:
    chosen = LLRConfig(policy="own_policies:halves")
    assert acts_on(chosen.policy) == "weight_decay"
    found = targets_for(ALPHAS, chosen)
    assert found == {f"block.{block}.mlp.up": 0.5 for block in range(BLOCKS)}


@pytest.mark.usefixtures("own_policies")
@pytest.mark.parametrize("name", ["minus", "strange", "broken", "number", "absent"])
def test_a_bad_policy_of_ones_own_is_named(name: str) -> None:
    with pytest.raises(ValueError, match=rf"bad --llr-policy own_policies:{name}: "):
        targets_for(ALPHAS, LLRConfig(policy=f"own_policies:{name}"))
    with pytest.raises(ValueError, match="No module named 'not_there'"):
        acts_on("not_there:f")


def test_the_policy_that_the_docs_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "policies.md").read_text()
    code = re.search(r"```python\n# my_policies.py\n(.*?)```", page, re.S)
    name = re.search(r"--llr-policy my_policies:(\w+)", page)
    assert code
    assert name
    (tmp_path / "my_policies.py").write_text(code[1])
    monkeypatch.syspath_prepend(str(tmp_path))
    found = targets_for(ALPHAS, LLRConfig(policy=f"my_policies:{name[1]}"))
    assert found.keys() == set(INSIDE)
    assert mean(found) == pytest.approx(1.0)


def test_role_mean_is_the_mean_of_esd_per_role() -> None:
    for preserving in (False, True):
        esd = targets_for(ALPHAS, config("esd", mean_preserving=preserving))
        averaged = targets_for(ALPHAS, config("role-mean", mean_preserving=preserving))
        assert mean(averaged) == pytest.approx(mean(esd))
        assert (averaged["embedding"], averaged["head"]) == (esd["embedding"], esd["head"])
        for role in ("attention.k", "mlp.down"):
            of_role = [esd[f"block.{block}.{role}"] for block in range(BLOCKS)]
            for block in range(BLOCKS):
                assert averaged[f"block.{block}.{role}"] == pytest.approx(sum(of_role) / BLOCKS)
    # A matrix without an exponent keeps its multiplier, as under esd.
    unknown = {**ALPHAS, "block.0.mlp.up": math.nan}
    assert "block.0.mlp.up" not in targets_for(unknown, config("role-mean"))


def test_factors_scale_single_roles_after_the_policy() -> None:
    plain = targets_for(ALPHAS, config("esd", mean_preserving=True))
    scaled = targets_for(
        ALPHAS, config("esd", mean_preserving=True, role_factors="k=0.7, embedding=1.3")
    )
    for matrix, target in scaled.items():
        factor = 0.7 if matrix.endswith(".k") else 1.3 if matrix == "embedding" else 1.0
        assert target == pytest.approx(plain[matrix] * factor)
    # A router is held at 1 by the policy, not by its factor.
    alphas = {**ALPHAS, MatrixId.read("block.0.mlp.router"): 2.0}
    assert targets_for(alphas, config("uniform", role_factors="router=0.5")) == {
        **dict.fromkeys(alphas, 1.0),
        "block.0.mlp.router": 0.5,
    }
    with pytest.raises(
        ValueError, match=r"--llr-role-factors names roles .*: router\. Its roles are "
    ):
        targets_for(ALPHAS, config("uniform", role_factors="router=0.5"))


def test_what_changes_multipliers_is_part_of_the_saved_meaning() -> None:
    new = {"role_factors", "depth_floor", "random_seed", "farms_rows", "farms_windows"}
    assert new <= set(settings_of(LLRConfig, "meaning"))
    # A run continues from a document that was saved before these settings existed.
    settings = LLRConfig()
    meaning = {field: value for field, value in settings.meaning().items() if field not in new}
    document = {
        "version": state.VERSION,
        "next_update": 1,
        "matrices": ["head"],
        "meaning": meaning,
        "timing": settings.timing(),
        "schedule": MultiplierSchedule(settings, 30, start=1).state_dict(),
        "alphas": {},
    }
    matrix_index = by_id({"head": info("head")})
    assert state.check(document, settings, matrix_index, settings.meaning()) == []
    later = {**document, "meaning": settings.meaning()}
    other = LLRConfig(random_seed=1)
    with pytest.raises(ValueError, match="--llr-random-seed is "):
        state.check(later, other, matrix_index, other.meaning())
