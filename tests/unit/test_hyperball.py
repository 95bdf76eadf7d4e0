"""Hyperball steps of one matrix, against Emerging-Optimizers and the formula."""

import pytest
import torch

from megatron_llr.matrices.ids import MatrixId
from megatron_llr.matrices.layout import Placement, Span
from megatron_llr.matrices.shard import MatrixShard
from megatron_llr.param_groups.hyperball_norms import SteppedDomain, reason_for_plain_step
from megatron_llr.param_groups.layer_groups import LayerGroups
from megatron_llr.param_groups.stepped_tensor import SteppedTensor
from tests.reference import hyperball
from tests.reference.matrix_ids import shard_of

MATRIX = MatrixId.read("block.0.mlp.down")


def shards_of(weight: torch.nn.Parameter) -> list[MatrixShard]:
    """The catalog of one matrix."""
    rows, columns = weight.shape
    placement = Placement((Span(0, 0, rows),), 0, columns)
    return [shard_of(MATRIX, weight, (placement,), rows, columns)]


def start(
    optimizer: torch.optim.Optimizer, weight: torch.nn.Parameter, rate: float | None
) -> LayerGroups:
    """The layer groups of an optimizer of one matrix, with a hyperball step."""
    shards = shards_of(weight)
    domain = SteppedDomain([weight], None, lambda group: 1e-2)
    groups = LayerGroups([(optimizer, [SteppedTensor(weight, weight)])], shards, domains=[domain])
    groups.start_hyperball(groups.norms(shards), rate)
    return groups


def test_muon_agrees_with_emerging_optimizers() -> None:
    """Where its defects do not show: one process, no decay, a matrix that is not fused."""
    package = pytest.importorskip("emerging_optimizers.orthogonalized_optimizers")
    torch.manual_seed(0)
    ours, theirs = (torch.nn.Parameter(w) for w in torch.randn(1, 24, 40).repeat(2, 1, 1))
    settings = {"lr": 1e-2, "momentum": 0.95, "nesterov": True, "weight_decay": 0.0}
    optimizer = package.Muon([ours], **settings)
    groups = start(optimizer, ours, 1e-2)
    reference = package.MuonHyperball([theirs], **settings)
    groups.set_multipliers({MATRIX: 1.0})
    for _ in range(20):
        gradient = torch.randn_like(ours)
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        optimizer.step()
        reference.step()
    assert torch.allclose(ours, theirs, rtol=0, atol=2e-6)


@pytest.mark.parametrize("multiplier", [1.0, 3.0])
def test_before_the_projection_a_step_has_the_size_of_its_rate(multiplier: float) -> None:
    """|W' - W| from eta m and the cosine, and W' from the formula; the moments are Adam's."""
    torch.manual_seed(1)
    weight = torch.nn.Parameter(0.02 * torch.randn(96, 64))
    optimizer = torch.optim.AdamW([weight], lr=1e-2, weight_decay=0.1)
    groups = start(optimizer, weight, 0.03)
    groups.set_multipliers({MATRIX: multiplier})
    adam = hyperball.Adam()
    radius = weight.detach().double().norm()
    for update in range(1, 12):
        optimizer.param_groups[0]["lr"] = 1e-2 * update / 12
        weight.grad = torch.randn_like(weight)
        before = weight.detach().clone()
        direction = adam.direction(weight.grad)
        rate = multiplier * 0.03 * update / 12
        expected = hyperball.step(before, direction, rate, radius)
        optimizer.step()
        assert torch.allclose(weight.double(), expected, rtol=0, atol=1e-8)
        step = groups._inner[0].hyperball
        assert step is not None
        assert step.cosines is not None
        cosine = hyperball.unit(before).flatten() @ hyperball.unit(direction).flatten()
        assert float(step.cosines[0]) == pytest.approx(float(cosine), abs=1e-6)


def test_weights_below_fp32_are_refused() -> None:
    """`assemble` refuses them with the flag; the library's own check is the last."""
    weight = torch.nn.Parameter(torch.randn(8, 8, dtype=torch.bfloat16))
    optimizer = torch.optim.AdamW([weight], lr=1e-2)
    groups = LayerGroups([(optimizer, [SteppedTensor(weight, weight)])], shards_of(weight))
    assert groups.without_fp32_weights == {"AdamW": torch.bfloat16}
    with pytest.raises(TypeError, match=r"needs fp32 weights.*\(8, 8\) tensor are torch.bfloat16"):
        start(optimizer, weight, None)


def test_without_a_direction_a_matrix_keeps_every_bit() -> None:
    weight = torch.nn.Parameter(torch.randn(8, 8))
    optimizer = torch.optim.AdamW([weight], lr=1e-2, weight_decay=0.1)
    groups = start(optimizer, weight, None)
    groups.set_multipliers({MATRIX: 2.0})
    before = weight.detach().clone()
    optimizer.step()
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    assert torch.equal(weight, before)


def test_a_step_that_raises_restores_the_weights() -> None:
    class Broken(torch.optim.AdamW):
        def step(self, closure: object = None) -> None:  # type: ignore[override]
            if self.broken:
                raise RuntimeError("broken")
            super().step()

        broken = False

    weight = torch.nn.Parameter(torch.randn(8, 8))
    optimizer = Broken([weight], lr=1e-2)
    start(optimizer, weight, None)
    weight.grad = torch.ones_like(weight)
    before = weight.detach().clone()
    Broken.broken = True
    with pytest.raises(RuntimeError, match="broken"):
        optimizer.step()
    assert torch.equal(weight, before)


@pytest.mark.parametrize(
    ("matrix", "reason"),
    [
        ("embedding", "an embedding"),
        ("position_embedding", "an embedding"),
        ("head", None),
        ("block.0.mlp.router", "a router"),
        ("block.0.mlp.shared.mix", "the gate of shared experts"),
        ("block.0.mlp.expert.3.up", None),
        ("block.0.attention.k", None),
        ("mtp.0.eh_proj", None),
    ],
)
def test_what_stays_with_the_plain_optimizer(matrix: str, reason: str | None) -> None:
    assert reason_for_plain_step(MatrixId.read(matrix)) == reason
