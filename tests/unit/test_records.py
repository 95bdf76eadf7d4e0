"""Matrix ids: roles, order, and the grammar of the layers they name."""

import pytest

from megatron_llr.matrices.ids import (
    ROLES,
    block_key,
    block_of,
    expert_of,
    model_order,
    role_of,
    value_for_role,
)
from megatron_llr.megatron.layers import Scope, hybrid_scopes, split_name
from megatron_llr.megatron.weight_names import (
    BLOCK_WEIGHTS,
    MODEL_WEIGHTS,
    PREDICTION_WEIGHTS,
    HeldRows,
    TransformerShape,
)


@pytest.mark.parametrize(
    ("matrix", "role", "block", "key", "expert"),
    [
        ("embedding", "embedding", None, "embedding", None),
        ("block.12.attention.q", "q", 12, "block.12", None),
        ("block.0.attention.gate", "attention.gate", 0, "block.0", None),
        ("block.0.attention2.gate", "attention.gate", 0, "block.0", None),
        ("block.3.mlp.gate", "gate", 3, "block.3", None),
        ("block.3.mlp2.up", "up", 3, "block.3", None),
        ("block.3.mlp.router", "router", 3, "block.3", None),
        ("block.3.mlp.expert.17.up", "expert.up", 3, "block.3", 17),
        ("block.3.mlp2.expert.17.down", "expert.down", 3, "block.3", 17),
        ("block.3.mlp.shared.gate", "shared.gate", 3, "block.3", None),
        ("block.3.mlp.shared.mix", "shared.mix", 3, "block.3", None),
        ("block.3.mamba.in_proj", "in_proj", 3, "block.3", None),
        ("mtp.1.eh_proj", "eh_proj", None, "mtp.1", None),
        ("mtp.1.mlp.expert.4.gate", "expert.gate", None, "mtp.1", 4),
    ],
)
def test_what_an_id_says(
    matrix: str, role: str, block: int | None, key: str, expert: int | None
) -> None:
    assert role_of(matrix) == role
    assert role in ROLES
    assert (block_of(matrix), block_key(matrix), expert_of(matrix)) == (block, key, expert)


def test_every_role_of_the_tables_is_listed_and_no_other() -> None:
    shape = TransformerShape(4, 2, 8, True, True, latent_query=8)
    found = {*MODEL_WEIGHTS.values(), *PREDICTION_WEIGHTS.values()}
    for rule in BLOCK_WEIGHTS:
        for role in rule.layout(shape, HeldRows(48, sections=[48])):
            found.add(role_of(f"block.0.{rule.prefix.replace('#', '0')}.{role}"))
    assert found == set(ROLES)


def test_a_table_of_roles_speaks_for_experts_unless_it_names_them() -> None:
    table = {"up": 2.0, "expert.up": 3.0, "gate": 4.0}
    matrices = ["mlp.up", "mlp.shared.up", "mlp.expert.1.up", "mlp.expert.1.gate", "mlp.down"]
    found = [value_for_role(table, f"block.0.{matrix}", 1.0) for matrix in matrices]
    assert found == [2.0, 2.0, 3.0, 4.0, 1.0]
    assert value_for_role(table, "block.0.attention.gate", 1.0) == 1.0


def test_the_order_is_that_of_the_model() -> None:
    ordered = [
        "embedding",
        "position_embedding",
        "block.2.attention.q",
        "block.2.attention.gate",
        "block.2.attention.o",
        "block.2.mlp.router",
        "block.2.mlp.up",
        "block.2.mlp.shared.down",
        "block.2.mlp.expert.2.gate",
        "block.2.mlp.expert.2.up",
        "block.2.mlp.expert.2.down",
        "block.2.mlp.expert.10.gate",
        "block.10.attention.q",
        "mtp.0.eh_proj",
        "mtp.0.attention.q",
        "mtp.1.eh_proj",
        "head",
    ]
    assert sorted(ordered[1::2] + ordered[::2], key=model_order) == ordered


@pytest.mark.parametrize(
    ("letters", "expected"),
    [
        ("*-M-", ["block.0.attention", "block.0.mlp", "block.1.mamba", "block.1.mlp"]),
        ("*--", ["block.0.attention", "block.0.mlp", "block.0.mlp2"]),
        ("-M-E", ["block.0.mlp", "block.0.mamba", "block.0.mlp2", "block.0.mlp3"]),
        ("MM*", ["block.0.mamba", "block.1.mamba", "block.2.attention"]),
    ],
)
def test_a_block_of_a_hybrid_model_begins_at_every_mixer(letters: str, expected: list[str]) -> None:
    kinds = {"*": "attention", "M": "mamba", "-": "mlp", "E": "mlp"}
    scopes = hybrid_scopes(letters)
    named = [scope.name(kinds[letter]) for scope, letter in zip(scopes, letters, strict=True)]
    assert named == expected


def test_a_hybrid_prediction_is_one_block() -> None:
    names = [scope.name("mlp.expert.3") for scope in hybrid_scopes("*E*E", "mtp.0")]
    assert names[1::2] == ["mtp.0.mlp.expert.3", "mtp.0.mlp2.expert.3"]


def test_a_weight_belongs_to_the_innermost_layer() -> None:
    scopes = {"mtp.layers.0": Scope("mtp.3"), "mtp.layers.0.mtp_model_layer": Scope("mtp.3", 2)}
    outer = split_name("mtp.layers.0.eh_proj.weight", scopes)
    inner = split_name("mtp.layers.0.mtp_model_layer.mlp.linear_fc1.weight", scopes)
    assert outer == (Scope("mtp.3"), "eh_proj.weight")
    assert inner == (Scope("mtp.3", 2), "mlp.linear_fc1.weight")
    assert split_name("output_layer.weight", scopes) is None
