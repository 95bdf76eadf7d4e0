"""Role tables: patterns, the first match, factors on the weight decay, and what is refused."""

import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_llr import LLRConfig
from megatron_llr.matrices.ids import MatrixId
from megatron_llr.policies import (
    decay_factors,
    meaning_of,
    read_role_table,
    report_table,
    share_multipliers,
    targets_for,
)
from megatron_llr.policies.role_table import RoleTable, TableRow, shipped_tables
from tests.reference.matrix_ids import by_id, info
from tests.unit.plain_values import KEYS, plain_values

NAMES = [
    "embedding",
    *(f"block.{block}.attention.{role}" for block in range(3) for role in "qkv"),
    *(f"block.{block}.mlp.{role}" for block in range(3) for role in ("up", "down")),
    "block.3.mlp.expert.11.up",
    "block.3.mlp.shared.up",
    "block.3.mlp.router",
    "head",
]
MODEL = by_id({name: info(name) for name in NAMES})


def table(*patterns: str) -> RoleTable:
    """Pattern number n has multiplier n, from 1."""
    return RoleTable("t", {p: TableRow(n) for n, p in enumerate(patterns, 1)})


def config_for(folder: Path, text: str, name: str = "t.yaml", **more: object) -> LLRConfig:
    """The policy fixed with a table of this text."""
    (folder / name).write_text(text)
    return LLRConfig(policy="fixed", role_table=str(folder / name), **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("patterns", "matrix", "expected"),
    [
        (["block.*.attention.k"], "block.12.attention.k", 0),
        (["block.*.attention.k"], "block.12.attention.q", None),
        (["block.{0,1}.mlp.*"], "block.1.mlp.up", 0),
        (["block.{0,1}.mlp.*"], "block.11.mlp.up", None),
        (["block.{0,1}.mlp.*"], "block.1.mlp.expert.3.up", 0),
        (["block.{1,2}{,0}.mlp.{up,down}"], "block.20.mlp.down", 0),
        (["{q,k}"], "block.4.attention.k", 0),
        (["block.?.mlp.up"], "block.10.mlp.up", None),
        (["block.[0-3].mlp.up"], "block.3.mlp.up", 0),
        # The first match, whichever kinds of pattern compete.
        (["block.0.mlp.up", "up"], "block.0.mlp.up", 0),
        (["up", "block.0.mlp.up"], "block.0.mlp.up", 0),
        (["block.0.*", "up"], "block.0.mlp.up", 0),
        (["up", "block.0.*"], "block.0.mlp.up", 0),
        (["up", "block.0.*"], "block.0.mlp.down", 1),
        (["*.q", "block.*", "*"], "head", 2),
        # A role stands for that of experts too, unless the table names it.
        (["up"], "block.0.mlp.expert.3.up", 0),
        (["up", "expert.up"], "block.0.mlp.expert.3.up", 1),
        (["up", "expert.up"], "block.0.mlp.shared.up", 0),
        (["gate"], "block.0.attention.gate", None),
        (["head"], "head", 0),
    ],
)
def test_the_first_pattern_that_matches_counts(
    patterns: list[str], matrix: str, expected: int | None
) -> None:
    pattern = table(*patterns).pattern_of(MatrixId.read(matrix))
    assert pattern == (None if expected is None else patterns[expected])


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("t.json", '{"block.*.attention.k": 0, "up": {"multiplier": 2, "weight_decay": 0.5}}'),
        ("t.yaml", "block.*.attention.k: 0\nup:\n  multiplier: 2\n  weight_decay: 5e-1\n"),
        ("t.yml", "{block.*.attention.k: 0.0, up: {multiplier: 2, weight_decay: 0.5}}"),
    ],
)
def test_json_and_yaml_give_multipliers_and_decay_factors(
    tmp_path: Path, name: str, text: str
) -> None:
    config = config_for(tmp_path, text, name)
    targets = targets_for(dict.fromkeys(MODEL, float("nan")), config)
    ups = {m for m in MODEL if m.weight == "up"}
    assert {m for m, target in targets.items() if target == 2.0} == ups
    assert {m for m, target in targets.items() if target == 0.0} == {
        f"block.{block}.attention.k" for block in range(3)
    }
    assert targets["head"] == targets["block.3.mlp.router"] == 1.0
    assert decay_factors(config, MODEL, ()) == dict.fromkeys(ups, 0.5)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("upper: 1", "'upper' is neither a role nor a matrix id"),
        ("block.0.mlp.upper: 1", "neither a role nor"),
        ("block.{0,1.mlp.up: 1", "brace without a partner"),
        ("'" + "{q,k}" * 30 + "': 1", "has more than 8 braces"),
        ("q: -1", "'q': -1: -1 is not a finite number of at least 0"),
        ("q: .inf", "finite"),
        ("q: true", "finite"),
        ("q: many", "'q': 'many'"),
        ("q: {multiplier: 1, decay: 2}", "a row has multiplier, weight_decay or both"),
        ("q: {}", "a row has"),
        ("q: {weight_decay: -1}", "-1 is not"),
        ("q: 1\nq: 2", "'q' is given twice"),
        ("q: [", "line 1: expected the node content"),
        ("- q", "not a mapping"),
        ("", "not a mapping"),
        ("1: 1", "the key 1 is not text"),
        ("{q,k}: 1", "quote a pattern that begins with {"),
    ],
)
def test_what_is_no_table_is_refused(tmp_path: Path, text: str, expected: str) -> None:
    config = config_for(tmp_path, text)
    with pytest.raises(ValueError, match=r"Cannot read --llr-role-table.*t\.yaml") as caught:
        targets_for(dict.fromkeys(MODEL, 2.0), config)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_repeated_key_of_json_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'q' is given twice"):
        meaning_of(config_for(tmp_path, '{"q": 1, "q": 2}', "t.json"))


def test_unmatched_matrices_and_unused_patterns_are_reported(tmp_path: Path) -> None:
    config = config_for(tmp_path, "'*.attention.?': 2\nk: 3\nblock.7.*: 0\nup: 1\n")
    unmatched, unused = report_table(config, MODEL)
    assert unmatched.endswith(
        "t.yaml: 5 of 19 matrices match no pattern and keep multiplier 1: embedding, "
        "block.0.mlp.down, block.1.mlp.down, block.2.mlp.down and 1 more"
    )
    assert unused.endswith(
        "patterns without effect, as no matrix matches them or an earlier pattern does: k, "
        "block.7.*"
    )
    assert report_table(config_for(tmp_path, "'*': 2", "all.yaml"), MODEL) == []
    assert report_table(LLRConfig(), MODEL) == []


@pytest.mark.parametrize("pattern", ["router", "block.*.mlp.router", "block.3.mlp.{router,up}"])
def test_routers_need_the_flag_that_frees_them(tmp_path: Path, pattern: str) -> None:
    text = f"'{pattern}': 0"
    alphas = dict.fromkeys(MODEL, 2.0)
    with pytest.raises(ValueError, match=r"--llr-router one\. Add --llr-router policy"):
        targets_for(alphas, config_for(tmp_path, text))
    free = config_for(tmp_path, text, "free.yaml", router="policy")
    assert targets_for(alphas, free)["block.3.mlp.router"] == 0.0
    # A pattern for everything does not name them.
    assert (
        targets_for(alphas, config_for(tmp_path, "'*': 2", "all.yaml"))["block.3.mlp.router"] == 1.0
    )


def test_the_saved_meaning_differs_with_the_order_where_it_counts(tmp_path: Path) -> None:
    def meaning(text: str) -> object:
        read_role_table.cache_clear()
        return meaning_of(config_for(tmp_path, text))["role_table"]

    assert meaning("q: 1\nk: 2") == meaning("k: 2\nq: {multiplier: 1.0}") == {"q": 1.0, "k": 2.0}
    assert meaning("q: 1\nblock.0.*: 2") != meaning("block.0.*: 2\nq: 1")
    assert meaning("q: {weight_decay: 2}") == {"q": {"multiplier": 1.0, "weight_decay": 2.0}}


def test_a_frozen_matrix_does_not_share_a_multiplier_that_moves_it() -> None:
    fused = {
        MatrixId.read(f"block.0.attention.{role}"): info(f"block.0.attention.{role}", "qkv")
        for role in "qkv"
    }
    targets = {matrix: 0.0 if matrix.role == "k" else 1.0 for matrix in fused}
    assert share_multipliers(targets, fused, "projection") == targets
    with pytest.raises(ValueError, match=r"attention\.k has multiplier 0.*--llr-granularity proj"):
        share_multipliers(targets, fused, "block")
    with pytest.raises(ValueError, match=r"its optimizer cannot step parts.*all of them or none"):
        share_multipliers(targets, fused, "projection", fused)
    assert set(share_multipliers(dict.fromkeys(fused, 0.0), fused, "block").values()) == {0.0}


def test_matrices_of_one_step_share_the_mean_decay(tmp_path: Path) -> None:
    fused = {
        MatrixId.read(f"block.0.attention.{role}"): info(f"block.0.attention.{role}", "qkv")
        for role in "qkv"
    }
    config = config_for(tmp_path, "k: {weight_decay: 0}")
    assert decay_factors(config, fused, fused) == dict.fromkeys(fused, pytest.approx(2 / 3))
    assert decay_factors(config, fused, ()) == {"block.0.attention.k": 0.0}


def test_a_mean_of_1_needs_a_matrix_that_moves(tmp_path: Path) -> None:
    config = config_for(tmp_path, "'block.*': 0", mean_preserving=True, router="policy")
    with pytest.raises(ValueError, match="--llr-mean-preserving divides by the mean"):
        targets_for(dict.fromkeys(MODEL, 2.0), config)


def test_shipped_tables_are_read_by_name() -> None:
    twelve = by_id(
        {
            "embedding": 0,
            **{f"block.{b}.{m}": 0 for b in range(12) for m in ("attention.q", "mlp.down")},
            "head": 0,
        }
    )
    expected = {
        "llr": (5.0, 1.24, 2.7, 1.24, 2.7, 5.0),
        "modded-nanogpt": (75.0, 1.0, 2.0, 1.0, 2.0, 1.0),
        "mup-width-4": (1.0, 0.25, 0.25, 0.25, 0.25, 0.25),
        "llrd-0.8-12": (0.8**11, 0.8**11, 0.8**11, 1.0, 1.0, 1.0),
    }
    assert set(shipped_tables()) == set(expected)
    for name, values in expected.items():
        config = LLRConfig(policy="fixed", role_table=name)
        targets = targets_for(dict.fromkeys(twelve, 2.0), config)
        few = ("embedding", *(m for m in twelve if m.block in (0, 11)), "head")
        assert [targets[m] for m in few] == pytest.approx(values, rel=1e-5), name
    page = (Path(__file__).parents[2] / "docs" / "policies.md").read_text()
    assert all(f"`{name}`" in page for name in expected)


def test_layerwise_decay_of_other_depths_is_a_depth_policy() -> None:
    """The file says so: the same multipliers from --llr-policy depth-exponential."""
    names = [f"block.{b}.mlp.up" for b in range(12)]
    alphas = by_id(dict.fromkeys(["embedding", *names, "head"], 2.0))
    table = targets_for(alphas, LLRConfig(policy="fixed", role_table="llrd-0.8-12"))
    depth = LLRConfig(policy="depth-exponential", inverse=True, depth_floor=0.8**11)
    assert table == pytest.approx(targets_for(alphas, depth), rel=1e-5)


TABLE_KEYS = st.sampled_from(["q", "head", "block.*.mlp.up", "{q,k}", "{", "*", "[", "up", "<<"])
TABLE_VALUES = plain_values(
    st.sampled_from([0, 1, -1, 1e-3, "5e-1", 10**400, {"multiplier": 2}, {"weight_decay": "x"}])
)
# Small files of large, deep or odd documents.
SNIPPETS = [
    *(
        "[" * 100_000,
        '{"q":' * 50_000,
        "!!int x",
        "q: 2001-99-99",
        "q: !!bool x",
        "\0",
        "q: \ud800",
    ),
    "a: &a {x: 1}\n" + "".join(f"{n}: &{n} {{<<: [*a, *a]}}\n" for n in "bcdefgh"),
    "q: " + "1" * 5000,
]


@given(
    content=st.dictionaries(TABLE_KEYS | KEYS, TABLE_VALUES, max_size=4).map(json.dumps)
    | st.text(max_size=40)
    | st.sampled_from(SNIPPETS),
    suffix=st.sampled_from(["json", "yaml"]),
)
def test_any_file_is_a_table_or_one_clear_error(content: str, suffix: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"t.{suffix}")
        path.write_bytes(content.encode("utf-8", "surrogatepass"))
        read_role_table.cache_clear()
        try:
            held = read_role_table(str(path)).content()
        except ValueError as refused:
            text = str(refused)
            assert text.startswith(f"megatron_llr: Cannot read --llr-role-table {path}: ")
            assert "\n" not in text
            assert len(text) < 2000
            return
    rows = {pattern: TableRow.read(value) for pattern, value in dict(held).items()}
    assert RoleTable("t", rows).content() == held
