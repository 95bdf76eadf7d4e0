"""Index algebra: fused, sharded rows against plain reshapes of the whole parameter."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_llr.matrices.layout import Placement, Span, flat_ranges, interleaved, stacked
from megatron_llr.measurement.transfers import assemble_matrix
from megatron_llr.megatron.weight_names import BLOCK_WEIGHTS, HeldRows, TransformerShape, find_rule
from tests.reference.matrix_ids import shard_of

RULES = {rule.path: rule.layout for rule in BLOCK_WEIGHTS}


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (8, 2), (8, 1)])
@pytest.mark.parametrize("shards", [1, 2, 4])
def test_qkv_of_all_ranks_makes_up_q_k_and_v(
    heads: int, groups: int, shards: int, gated: bool
) -> None:
    """Also where a query group is split over ranks; the oracle is a reshape by query group."""
    channels, columns = 6, 5
    shape = TransformerShape(heads, groups, channels, True, gated)
    per_group = heads // groups * channels
    sizes = [per_group, *([per_group] if gated else []), channels, channels]
    fused = torch.arange(groups * sum(sizes) * columns).view(groups, sum(sizes), columns)
    parts = fused.split(sizes, dim=1)
    roles = ["q", "gate", "k", "v"] if gated else ["q", "k", "v"]
    local = fused.reshape(-1, columns).chunk(shards)
    spans = [
        RULES["self_attention.linear_qkv.weight"](shape, HeldRows(len(local[rank]), rank, shards))
        for rank in range(shards)
    ]
    for role, part in zip(roles, parts, strict=True):
        whole = part.reshape(-1, columns)
        placements = [Placement(found.get(role, ()), 0, columns) for found in spans]
        pieces = [
            torch.cat([local[r][s.local : s.local + s.count] for s in p.spans]).view(-1)
            if p.spans
            else local[r][:0].view(-1)
            for r, p in enumerate(placements)
        ]
        assert torch.equal(assemble_matrix(pieces, placements, *whole.shape), whole), role


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_a_fused_down_projection_holds_the_query_first(shards: int) -> None:
    """Split over ranks without regard to where the query ends, or duplicated."""
    whole = torch.arange(28).view(28, 1)
    shape = TransformerShape(4, 4, 6, True, False, latent_query=12)
    layout = RULES["self_attention.linear_qkv_down_proj.weight"]
    local = whole.chunk(shards)
    held = [HeldRows(len(part), rank, shards) for rank, part in enumerate(local)]
    for role, expected in (("q_down", whole[:12]), ("kv_down", whole[12:])):
        spans = [layout(shape, rows).get(role, ()) for rows in held]
        pieces = [
            torch.cat([part[:0], *(part[s.local : s.local + s.count] for s in found)]).view(-1)
            for part, found in zip(local, spans, strict=True)
        ]
        placements = [Placement(found, 0, 1) for found in spans]
        assert torch.equal(assemble_matrix(pieces, placements, *expected.shape), expected)
    duplicated = layout(shape, HeldRows(28))
    assert duplicated == {"q_down": (Span(0, 0, 12),), "kv_down": (Span(12, 0, 16),)}


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_sections_of_all_ranks_make_up_the_whole(shards: int) -> None:
    """Megatron's Mamba in_proj: every rank holds its piece of z, of x, of B, of C and of dt."""
    sections = [torch.randn(rows, 3) for rows in (8, 8, 4, 4, 4)]
    layout = RULES["mixer.in_proj.weight"]
    pieces, placements = [], []
    for rank in range(shards):
        parts = [section.chunk(shards)[rank] for section in sections]
        held = HeldRows(28 // shards, rank, shards, [len(part) for part in parts])
        (spans,) = layout(TransformerShape(4, 4, 6, True, False), held).values()
        local = torch.cat(parts)
        pieces.append(torch.cat([local[s.local : s.local + s.count] for s in spans]).view(-1))
        placements.append(Placement(spans, 0, 3))
    assert torch.equal(assemble_matrix(pieces, placements, 28, 3), torch.cat(sections))


def test_every_weight_of_the_table_is_found_by_its_name() -> None:
    for rule in BLOCK_WEIGHTS:
        number = 12 if rule.of_expert else None
        assert find_rule(rule.path.replace("#", "12")) == (rule, number), rule.path
    assert find_rule("mlp.linear_fc1.weight3") is None
    assert find_rule("mlp.experts.linear_fc1.weight") is None
    assert find_rule("self_attention.core_attention.indexer.linear_wk.weight") is None


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_gate_and_up_are_stacked_on_every_rank(shards: int) -> None:
    whole = {"gate": torch.arange(24).view(8, 3), "up": 100 + torch.arange(24).view(8, 3)}
    for shard in range(shards):
        local = torch.cat([whole[role].chunk(shards)[shard] for role in ("gate", "up")])
        for role, spans in stacked(("gate", "up"), len(local), shard).items():
            (span,) = spans
            piece = local[span.local : span.local + span.count]
            assert torch.equal(piece, whole[role][span.logical : span.logical + span.count])


@given(st.data())
def test_flat_ranges_of_all_roles_cover_every_slice_once(data: st.DataObject) -> None:
    """Wherever a distributed-optimizer shard is cut, also inside a row."""
    sizes = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    periods, columns = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 5))
    rows = periods * sum(sizes)
    parts = [(f"r{i}", size) for i, size in enumerate(sizes)]
    spans = interleaved(parts, periods, 0, rows)
    start = data.draw(st.integers(0, rows * columns - 1))
    stop = data.draw(st.integers(start + 1, rows * columns))
    owner = [role for _ in range(periods) for role, size in parts for _ in range(size * columns)]
    seen = [""] * (stop - start)
    for role, runs in spans.items():
        for first, last in flat_ranges(runs, columns, start, stop):
            for position in range(first, last):
                assert seen[position] == ""
                seen[position] = role
    assert seen == owner[start:stop]


def test_touching_runs_are_joined() -> None:
    assert interleaved([("q", 2)], 3, 0, 6) == {"q": (Span(0, 0, 6),)}
    assert flat_ranges((Span(0, 0, 1), Span(1, 5, 1)), 4, 0, 8) == ((0, 8),)


@pytest.mark.parametrize(("heads", "groups", "shards"), [(4, 1, 4), (8, 1, 4), (32, 2, 8)])
def test_a_matrix_is_split_though_the_first_ranks_hold_nothing_of_it(
    heads: int, groups: int, shards: int
) -> None:
    """Key and value rows of few query groups lie at the end of each group's rows."""
    rows = (heads + 2 * groups) * 64 // shards
    parts = [("q", heads // groups * 64), ("k", 64), ("v", 64)]
    for name in ("q", "k", "v"):
        held = tuple(
            Placement(
                interleaved(parts, groups, rank * rows, (rank + 1) * rows).get(name, ()), 0, 5
            )
            for rank in range(shards)
        )
        ranks = tuple(range(shards))
        parameter = torch.nn.Parameter(torch.ones(1))
        shard = shard_of(name, parameter, held, 1, 5, ranks)
        assert shard.split
