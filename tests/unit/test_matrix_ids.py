"""Matrix ids: roles, order, and the grammar of the layers they name."""

import json
import pickle

import pytest

from megatron_llr.matrices.ids import ROLES, MatrixId, value_for_role
from megatron_llr.megatron.layers import Scope, hybrid_scopes, split_name
from megatron_llr.megatron.weight_names import (
    BLOCK_WEIGHTS,
    MODEL_WEIGHTS,
    PREDICTION_WEIGHTS,
    HeldRows,
    TransformerShape,
)


@pytest.mark.parametrize(
    ("text", "role", "block", "container", "expert"),
    [
        ("embedding", "embedding", None, "", None),
        ("head", "head", None, "", None),
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
def test_the_parts_of_an_id(
    text: str, role: str, block: int | None, container: str, expert: int | None
) -> None:
    matrix = MatrixId.read(text)
    assert role in ROLES
    assert (matrix.role, matrix.block, matrix.container, matrix.expert) == (
        role,
        block,
        container,
        expert,
    )
    assert matrix == text
    assert type(str(matrix)) is str
    again = pickle.loads(pickle.dumps(matrix))
    assert (again, again.order, again.module) == (matrix, matrix.order, matrix.module)


def test_ids_and_strings_index_the_same_tables() -> None:
    matrix = MatrixId("q", container="block.3", module="attention")
    assert json.loads(json.dumps({matrix: 2.0}))[matrix] == 2.0
    assert {matrix: 2.0}["block.3.attention.q"] == 2.0  # type: ignore[index]


@pytest.mark.parametrize(
    "text", ["", "block.3", "block.x.q", "Block.3.q", "layers.3.q", "block.3.attention.q.weight"]
)
def test_other_names_are_no_ids(text: str) -> None:
    with pytest.raises(ValueError, match="not a matrix id"):
        MatrixId.read(text)


def test_every_role_of_the_tables_is_listed_and_no_other() -> None:
    shape = TransformerShape(4, 2, 8, True, True, latent_query=8)
    roles = {weight.role for weight in (*MODEL_WEIGHTS.values(), *PREDICTION_WEIGHTS.values())}
    for rule in BLOCK_WEIGHTS:
        expert = 0 if rule.of_expert else None
        parameter = Scope("block.0").matrix_id(rule.parameter, rule.module, expert)
        for weight in rule.layout(shape, HeldRows(48, sections=[48])):
            roles.add(parameter.sibling(weight).role)
    assert roles == set(ROLES)


def test_a_table_of_roles_speaks_for_experts_unless_it_names_them() -> None:
    table = {"up": 2.0, "expert.up": 3.0, "gate": 4.0}
    matrices = ["mlp.up", "mlp.shared.up", "mlp.expert.1.up", "mlp.expert.1.gate", "mlp.down"]
    ids = [MatrixId.read(f"block.0.{matrix}") for matrix in matrices]
    assert [value_for_role(table, matrix, 1.0) for matrix in ids] == [2.0, 2.0, 3.0, 4.0, 1.0]
    assert value_for_role(table, MatrixId.read("block.0.attention.gate"), 1.0) == 1.0


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
    ids = [MatrixId.read(text) for text in ordered]
    assert sorted(ids[1::2] + ids[::2]) == ordered


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
    ids = [
        scope.matrix_id("up", kinds[letter]) for scope, letter in zip(scopes, letters, strict=True)
    ]
    assert ids == [f"{layer}.up" for layer in expected]


def test_a_hybrid_prediction_is_one_block() -> None:
    ids = [scope.matrix_id("up", "mlp.expert", 3) for scope in hybrid_scopes("*E*E", "mtp.0")]
    assert ids[1::2] == ["mtp.0.mlp.expert.3.up", "mtp.0.mlp2.expert.3.up"]


def test_a_weight_belongs_to_the_innermost_layer() -> None:
    scopes = {"mtp.layers.0": Scope("mtp.3"), "mtp.layers.0.mtp_model_layer": Scope("mtp.3", 2)}
    outer = split_name("mtp.layers.0.eh_proj.weight", scopes)
    inner = split_name("mtp.layers.0.mtp_model_layer.mlp.linear_fc1.weight", scopes)
    assert outer == (Scope("mtp.3"), "eh_proj.weight")
    assert inner == (Scope("mtp.3", 2), "mlp.linear_fc1.weight")
    assert split_name("output_layer.weight", scopes) is None
