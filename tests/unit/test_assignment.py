"""Balance of the measurement's work over ranks."""

import pytest

from megatron_llr.engine.assignment import assign_owners, cost
from megatron_llr.records import MatrixInfo

# hidden, ffn, heads (all of them key/value heads), blocks (arXiv 2605.22297 and its repository)
MODELS = {"1b": (2048, 5461, 24), "3b": (2560, 6848, 32)}


def model(name: str, *, tp: int, pp: int, dp: int) -> list[MatrixInfo]:
    """The matrices of a LLaMA model on TP x PP x DP ranks, tensor-parallel fastest."""
    hidden, ffn, blocks = MODELS[name]
    found = []
    for block in range(blocks):
        stage = block * pp // blocks
        holders = tuple(
            tuple(range((stage * dp + replica) * tp, (stage * dp + replica + 1) * tp))
            for replica in range(dp)
        )
        shapes = dict.fromkeys("qkvo", (hidden, hidden))
        shapes |= {"gate": (ffn, hidden), "up": (ffn, hidden), "down": (hidden, ffn)}
        for role, (rows, columns) in shapes.items():
            name = f"block.{block}.x.{role}"
            found.append(MatrixInfo(name, name, rows, columns, holders, tp > 1))
    return found


@pytest.mark.parametrize(
    ("name", "tp", "pp", "dp"),
    [("1b", 1, 1, 8), ("1b", 2, 1, 4), ("1b", 1, 1, 64), ("3b", 4, 2, 32), ("3b", 4, 2, 2)],
)
def test_the_slowest_rank_is_near_the_lower_bound(name: str, tp: int, pp: int, dp: int) -> None:
    """Within 10 % of what no assignment can beat: the mean load, the costliest matrix, and, since
    matrices are whole, the load of a rank that gets one more than the others.
    """
    matrices = model(name, tp=tp, pp=pp, dp=dp)
    owners = assign_owners(matrices)
    load: dict[int, float] = {}
    for info in matrices:
        assert any(owners[info.matrix] in group for group in info.holders)
        load[owners[info.matrix]] = load.get(owners[info.matrix], 0.0) + cost(info)
    costs = sorted((cost(info) for info in matrices), reverse=True)
    ranks = tp * pp * dp
    crowded = sum(costs[ranks - 1 : ranks + 1]) if len(costs) > ranks else 0.0
    several = -(-len(costs) // ranks) * costs[-1]
    bound = max(sum(costs) / ranks, costs[0], crowded, several)
    assert max(load.values()) <= 1.1 * bound


def test_owners_depend_on_nothing_but_the_matrices() -> None:
    matrices = model("1b", tp=2, pp=2, dp=2)
    assert assign_owners(matrices) == assign_owners(reversed(matrices))
