"""Balance of the measurement's work over ranks."""

import pytest

from megatron_llr.matrices.info import MatrixInfo
from megatron_llr.measurement.owners import assign_owners, cost
from tests.reference.matrix_ids import info

# hidden, ffn, heads (all of them key/value heads), blocks (arXiv 2605.22297 and its repository)
MODELS = {"1b": (2048, 5461, 24), "3b": (2560, 6848, 32)}


def model(name: str, *, tp: int, pp: int, dp: int) -> list[MatrixInfo]:
    """The matrices of a LLaMA model on TP x PP x DP ranks, tensor-parallel fastest."""
    hidden, ffn, blocks = MODELS[name]
    matrices = []
    for block in range(blocks):
        stage = block * pp // blocks
        holders = tuple(
            tuple(range((stage * dp + replica) * tp, (stage * dp + replica + 1) * tp))
            for replica in range(dp)
        )
        shapes = dict.fromkeys("qkvo", (hidden, hidden))
        shapes |= {"gate": (ffn, hidden), "up": (ffn, hidden), "down": (hidden, ffn)}
        for role, (rows, columns) in shapes.items():
            name = f"block.{block}.mlp.{role}"
            matrices.append(info(name, name, rows, columns, holders, tp > 1))
    return matrices


@pytest.mark.parametrize(
    ("name", "tp", "pp", "dp"),
    [("1b", 1, 1, 8), ("1b", 2, 1, 4), ("1b", 1, 1, 64), ("3b", 4, 2, 32), ("3b", 4, 2, 2)],
)
def test_the_slowest_rank_is_near_the_lower_bound(name: str, tp: int, pp: int, dp: int) -> None:
    """Within 10 % of a lower bound: the mean load, the costliest matrix, and, since matrices are
    not divided, the load of a rank that gets one more than the others.
    """
    matrices = model(name, tp=tp, pp=pp, dp=dp)
    owners = assign_owners(matrices)
    load: dict[int, float] = {}
    for matrix in matrices:
        assert any(owners[matrix.matrix] in group for group in matrix.holders)
        load[owners[matrix.matrix]] = load.get(owners[matrix.matrix], 0.0) + cost(matrix)
    costs = sorted((cost(matrix) for matrix in matrices), reverse=True)
    ranks = tp * pp * dp
    crowded = sum(costs[ranks - 1 : ranks + 1]) if len(costs) > ranks else 0.0
    several = -(-len(costs) // ranks) * costs[-1]
    bound = max(sum(costs) / ranks, costs[0], crowded, several)
    assert max(load.values()) <= 1.1 * bound


def test_each_matrix_goes_to_the_least_loaded_of_its_holders() -> None:
    """Against plain code, where experts have fewer holders than attention, and ties are many."""
    matrices = model("1b", tp=2, pp=2, dp=8)
    for expert in range(300):
        ranks = tuple((4 * (expert % 5) + replica,) for replica in range(3))
        name = f"block.0.mlp.expert.{expert}.up"
        matrices.append(info(name, name, 512 + expert // 100, 768, ranks))
    load = dict.fromkeys(range(32), 0.0)
    owners = assign_owners(matrices)
    for matrix in sorted(matrices, key=lambda info: (-cost(info), info.matrix)):
        holders = {rank for group in matrix.holders for rank in group}
        expected = min(holders, key=lambda rank: (load[rank], rank))
        assert owners[matrix.matrix] == expected
        load[expected] += cost(matrix)


def test_owners_depend_on_nothing_but_the_matrices() -> None:
    matrices = model("1b", tp=2, pp=2, dp=2)
    assert assign_owners(matrices) == assign_owners(reversed(matrices))
