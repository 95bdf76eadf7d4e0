"""Multiplier 0 and factors on the weight decay, for every way of stepping."""

from typing import Any

import pytest
import torch

from megatron_llr import LLRConfig
from megatron_llr.matrices.ids import MatrixId
from megatron_llr.param_groups.inner_groups import InnerGroups
from megatron_llr.param_groups.stepped_tensor import SteppedTensor
from megatron_llr.schedule import MultiplierSchedule
from tests.unit.fused import OPTIMIZERS, RANGES, SETTINGS, fused_groups
from tests.unit.test_hyperball import MATRIX, start

SHAPE = (8, 6)
# Optimizers with decoupled and with L2 decay.
KINDS = {**OPTIMIZERS, "adam-l2": lambda groups: torch.optim.Adam(groups, **SETTINGS)}


def mask_of(matrix: str) -> torch.Tensor:
    """The elements of a matrix of `RANGES`."""
    mask = torch.zeros(48, dtype=torch.bool)
    for first, last in RANGES[matrix]:
        mask[first:last] = True
    return mask.view(SHAPE)


def start_weights() -> torch.nn.Parameter:
    """Weights of a fixed seed."""
    return torch.nn.Parameter(torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)))


def steps(optimizer: torch.optim.Optimizer, tensor: torch.Tensor, count: int = 3) -> None:
    """Steps with random gradients of fixed seeds."""
    for seed in range(count):
        tensor.grad = torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))
        optimizer.step()


def at_rate_0(kind: str) -> tuple[torch.Tensor, dict[str, Any]]:
    """Weights and state of the plain optimizer after steps at learning rate 0."""
    tensor = start_weights()
    optimizer = KINDS[kind]([{"params": [tensor], "lr": 0.0}])
    steps(optimizer, tensor)
    return tensor.detach(), optimizer.state[tensor]


@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_part_of_a_fused_tensor_freezes_as_at_rate_0(kind: str, decoupled: bool) -> None:
    tensor = start_weights()
    before = tensor.detach().clone()
    optimizer = KINDS[kind]([{"params": [tensor]}])
    groups = fused_groups(optimizer, tensor, RANGES, decoupled_decay=decoupled)
    groups.multipliers = {"q": 1.5, "k": 0.0, "v": 1.0}
    steps(optimizer, tensor)
    frozen = mask_of("k")
    assert torch.equal(tensor[frozen], before[frozen])
    assert (tensor[~frozen] != before[~frozen]).all()
    weights, state = at_rate_0(kind)
    assert torch.equal(weights, before)
    for key, value in state.items():
        ours = optimizer.state[tensor][key]
        if isinstance(value, torch.Tensor) and value.shape == frozen.shape:
            assert torch.equal(ours[frozen], value[frozen]), key
            assert (value != 0).all(), key
        else:
            assert float(ours) == float(value) == 3, key


@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_tensor_freezes_as_at_rate_0(kind: str, decoupled: bool) -> None:
    tensor, other = start_weights(), start_weights()
    optimizer = KINDS[kind]([{"params": [tensor, other]}])
    parts = {
        id(each): (SteppedTensor(each, each), ((MatrixId(name), ((0, 48),)),))
        for name, each in (("o", tensor), ("down", other))
    }
    groups = InnerGroups(optimizer, parts, decoupled_decay=decoupled)
    groups.multipliers = {MatrixId("o"): 0.0, MatrixId("down"): 2.0}
    other.grad = torch.ones(SHAPE)
    steps(optimizer, tensor)
    weights, state = at_rate_0(kind)
    assert torch.equal(tensor, weights)
    assert not torch.equal(other, weights)
    for key, value in state.items():
        assert torch.equal(torch.as_tensor(optimizer.state[tensor][key]), torch.as_tensor(value))


@pytest.mark.parametrize("decoupled", [False, True])
def test_factors_on_the_decay_are_apart_from_the_multiplier(decoupled: bool) -> None:
    """With no gradient but decay; also where two matrices differ in the decay only."""
    tensor = torch.nn.Parameter(torch.ones(SHAPE, dtype=torch.float64))
    optimizer = OPTIMIZERS["adamw"]([{"params": [tensor]}])
    groups = fused_groups(optimizer, tensor, RANGES, decoupled_decay=decoupled)
    groups.multipliers = {"q": 2.0, "k": 2.0, "v": 1.0}
    groups.decay_factors = {"k": 0.0, "v": 3.0}
    tensor.grad = torch.zeros(SHAPE, dtype=torch.float64)
    optimizer.step()
    for matrix, factor in {"q": 1.0 if decoupled else 2.0, "k": 0.0, "v": 3.0}.items():
        kept = 1 - 0.01 * 0.1 * factor
        elements = tensor[mask_of(matrix)].tolist()
        assert elements == pytest.approx([kept] * len(elements), rel=1e-12)


@pytest.mark.parametrize("decoupled", [False, True])
def test_rows_of_a_tensor_that_muon_steps_whole(decoupled: bool) -> None:
    """Row scaling: k is frozen, v decays by its factor, and the momentum is Muon's own."""
    package = pytest.importorskip("emerging_optimizers.orthogonalized_optimizers")
    settings = {"lr": 0.01, "momentum": 0.95, "nesterov": True, "weight_decay": 0.1}
    plain, plain_weights = None, start_weights()
    rows = {"q": ((0, 24),), "k": ((24, 36),), "v": ((36, 48),)}
    tensor = start_weights()
    before = tensor.detach().clone()
    optimizer = package.Muon([tensor], weight_decay_method="decoupled", **settings)
    plain = package.Muon([plain_weights], weight_decay_method="decoupled", **settings)
    parts = tuple((MatrixId(name), runs) for name, runs in rows.items())
    stepped = SteppedTensor(tensor, tensor, split=True)
    groups = InnerGroups(optimizer, {id(tensor): (stepped, parts)}, decoupled_decay=decoupled)
    groups.multipliers = {MatrixId("q"): 1.0, MatrixId("k"): 0.0, MatrixId("v"): 2.0}
    groups.decay_factors = {MatrixId("v"): 0.0}
    steps(optimizer, tensor, 1)
    steps(plain, plain_weights, 1)
    change, whole = tensor.detach() - before, plain_weights.detach() - before
    assert torch.equal(tensor[4:6], before[4:6])
    torch.testing.assert_close(change[:4], whole[:4], rtol=1e-5, atol=1e-7)
    # Without its decay, of .001 W, twice the update.
    torch.testing.assert_close(
        change[6:], 2 * (whole[6:] + 0.001 * before[6:]), rtol=1e-4, atol=1e-6
    )
    momentum = optimizer.state[tensor]["momentum_buffer"]
    assert torch.equal(momentum, plain.state[plain_weights]["momentum_buffer"])
    assert (momentum[4:6] != 0).all()


def test_a_hyperball_step_at_0_keeps_every_bit_and_the_moments_run_on() -> None:
    weights = [torch.nn.Parameter(torch.randn(8, 8)) for _ in range(2)]
    weights[1].data.copy_(weights[0].data)
    before = weights[0].detach().clone()
    optimizers = [torch.optim.AdamW([weight], lr=1e-2, weight_decay=0.1) for weight in weights]
    groups = start(optimizers[0], weights[0], 0.03)
    groups.set_multipliers({MATRIX: 0.0})
    for _ in range(3):
        gradient = torch.randn(8, 8)
        for weight, optimizer in zip(weights, optimizers, strict=True):
            weight.grad = gradient.clone()
            optimizer.step()
    assert torch.equal(weights[0], before)
    ours, plain = (o.state[w] for o, w in zip(optimizers, weights, strict=True))
    assert all(torch.equal(ours[key], value) for key, value in plain.items())


def test_a_matrix_freezes_at_once_and_others_ramp() -> None:
    schedule = MultiplierSchedule(LLRConfig(interval=10, ramp_iters=4), 100, start=5)
    frozen, other = MatrixId.read("block.0.attention.k"), MatrixId.read("block.0.attention.q")
    schedule.observe(5, {frozen: 0.0, other: 2.0})
    assert schedule.multipliers(5) == {frozen: 0.0, other: pytest.approx(1.2)}
    assert schedule.multipliers(9) == {frozen: 0.0, other: 2.0}
