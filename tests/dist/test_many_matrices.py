"""What keeps thousands of matrices cheap: bounded gathers, lists told once, loads kept in heaps."""

from collections import defaultdict
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_llr.matrices.index import build_matrix_index
from megatron_llr.matrices.layout import Placement, Span
from megatron_llr.matrices.shard import MatrixShard
from megatron_llr.measurement import transfers
from megatron_llr.ranks import gather_distinct, gather_objects, require_equal
from tests.reference.matrix_ids import shard_of


@pytest.mark.world_size(1, 2, 4)
@pytest.mark.parametrize("limit", [1, 200, 10**6])
def test_vectors_of_all_ranks_arrive_in_bounded_batches(
    limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks bring different numbers of vectors of different sizes; some bring none."""
    world, here = dist.get_world_size(), dist.get_rank()
    sizes = [[3 + (rank + i) % 5 for i in range(7 * (rank % 3))] for rank in range(world)]
    sizes[0] = [5, 2]

    def vector(rank: int, index: int) -> torch.Tensor:
        return torch.arange(sizes[rank][index], dtype=torch.float64) + 100 * rank + 10 * index

    widest: list[int] = []
    gather = transfers.all_gather_rows

    def watched(rows: torch.Tensor, counts: Any) -> Any:
        widest.append(max(counts) * len(counts) * 8)
        return gather(rows, counts)

    monkeypatch.setattr(transfers, "all_gather_rows", watched)
    found: dict[tuple[int, int], torch.Tensor] = {}
    mine = [vector(here, index) for index in range(len(sizes[here]))]
    for rank, which, values in transfers.all_gather_in_batches(
        mine, sizes, torch.device("cpu"), limit
    ):
        parts = values.split(sizes[rank][which])
        found.update({(rank, which.start + i): part for i, part in enumerate(parts)})
    assert sorted(found) == [(r, i) for r in range(world) for i in range(len(sizes[r]))]
    assert all(torch.equal(part, vector(*place)) for place, part in found.items())
    # One vector per rank is the least that a batch can hold.
    assert max(widest) <= max(limit, 7 * 8 * world)
    assert len(widest) == 1 or limit < 10**6


@pytest.mark.world_size(1, 2, 4)
def test_equal_values_travel_once_and_are_one_object() -> None:
    told = gather_distinct(["shared", [1, dist.get_rank() // 2]])
    assert told == [["shared", [1, rank // 2]] for rank in range(dist.get_world_size())]
    for rank in range(1, dist.get_world_size(), 2):
        assert told[rank] is told[rank - 1]


@pytest.mark.world_size(2)
def test_settings_that_differ_are_named_those_that_do_not_are_fine() -> None:
    require_equal({"--a": 1, "--b": [2.0]}, str)
    with pytest.raises(RuntimeError, match="--b differs between ranks: 0 on rank 0, 1 on rank"):
        require_equal({"--a": 1, "--b": dist.get_rank()}, lambda flag: f"mend {flag}")


@pytest.mark.world_size(2, 4)
def test_the_directory_is_the_plain_merge_of_what_ranks_hold() -> None:
    """Experts on their ranks alone, attention on all, a copy left out; tuples shared."""
    here, world = dist.get_rank(), dist.get_world_size()
    parameter = torch.nn.Parameter(torch.ones(64, 64))

    def shard(matrix: str, ranks: tuple[int, ...], copy: bool = False) -> MatrixShard:
        placements = tuple(Placement((Span(0, 0, 64),), 0, 64) for _ in ranks)
        return shard_of(matrix, parameter, placements, 64, 64, ranks, copy)

    pair = (here - here % 2, here - here % 2 + 1)
    shards = [shard(f"block.{b}.attention.q", pair) for b in range(2)]
    # Two ranks share the experts of a parity, so that at four ranks each expert has two replicas.
    shards += [shard(f"block.0.mlp.expert.{2 * e + here % 2}.up", (here,)) for e in range(3)]
    shards.append(shard("embedding", (here,), copy=here != 0))
    plain: dict[str, set[tuple[int, ...]]] = defaultdict(set)
    for told in gather_objects([(s.matrix, s.ranks) for s in shards if not s.copy]):
        for matrix, ranks in told:
            plain[matrix].add(ranks)
    matrix_index = build_matrix_index(shards)
    assert {m: info.holders for m, info in matrix_index.items()} == {
        matrix: tuple(sorted(groups)) for matrix, groups in plain.items()
    }
    holders = [info.holders for info in matrix_index.values()]
    assert len({id(found) for found in holders}) == len(set(holders))
    assert len(plain["block.0.mlp.expert.1.up"]) == world // 2
    other = shard_of("head", parameter, (), 64 + here, 64, (here,))
    with pytest.raises(RuntimeError, match=r"ranks disagree about the shape of head.*on rank 1"):
        build_matrix_index([*shards, other])
