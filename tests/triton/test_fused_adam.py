"""The fused step against the formula of each optimizer, and against the optimizers themselves."""

import copy
import logging
import re
from typing import Any

import pytest
import torch

from megatron_llr.param_groups.fused_adam import FusedAdamStep
from megatron_llr.param_groups.fused_support import reason_unsupported
from megatron_llr.param_groups.inner_groups import InnerGroups
from megatron_llr.param_groups.stepped_tensor import SteppedTensor
from tests.triton.adam import (
    DECAY,
    MULTIPLIERS,
    OPTIMIZERS,
    RATE,
    SETTINGS,
    TENSORS,
    GroupCounter,
    Model,
    assert_within_rounding,
    rates_of,
)

EVERY = pytest.mark.parametrize("name", OPTIMIZERS)
STEPS = ("fused", "grouped")


def step_and_check(model: Model, name: str, seed: int, device: str, **gradients: Any) -> None:
    """One step of a model; every tensor against the formula, or untouched without gradient."""
    before = model.snapshot()
    model.set_gradients(seed, **gradients)
    model.optimizer.step()
    after = model.snapshot()
    assert model.groups is not None
    for tensor in TENSORS:
        gradient = model.gradient(tensor)
        if gradient is None:
            for key in ("p", "m", "v"):
                assert torch.equal(before[tensor][key], after[tensor][key]), (tensor, key)
            continue
        rates = rates_of(tensor, device, model.groups.multipliers)
        decay = torch.full_like(rates, 0.0 if tensor == "norm" else DECAY)
        if model.groups._decoupled_decay:
            decay = decay * RATE / rates
        decoupled = not name.endswith("L2")
        assert_within_rounding(
            before[tensor], after[tensor], gradient, rates, decay=decay, decoupled=decoupled
        )
        if model.masters:
            copy_, weights = model.tensors[tensor], model.weights(tensor)
            if device == "cpu" and copy_.dtype == torch.bfloat16:
                # Triton's interpreter truncates; a GPU rounds.
                weights = (weights.view(torch.int32) & -65536).view(torch.float32)
            assert torch.equal(copy_, weights.to(copy_.dtype))


@EVERY
def test_a_step_is_that_of_the_formula(name: str, device: str) -> None:
    model = Model(name, device, "fused")
    for seed in range(4):
        step_and_check(model, name, seed, device, without=["down"] if seed == 2 else [])


@EVERY
def test_decay_as_at_multiplier_1(name: str, device: str) -> None:
    model = Model(name, device, "fused", decoupled_decay=True)
    for seed in range(2):
        step_and_check(model, name, seed, device)


@pytest.mark.parametrize("decoupled", [False, True])
@EVERY
def test_multiplier_0_and_factors_on_the_decay(name: str, decoupled: bool, device: str) -> None:
    """Frozen weights keep every bit while their moments move; the rest as in param groups."""
    fused, grouped = (Model(name, device, s, decoupled_decay=decoupled) for s in STEPS)
    before = fused.snapshot()
    frozen = {**dict.fromkeys(MULTIPLIERS, 1.0), "k": 0.0, "down": 0.0, "b": 2.0}
    for seed in range(3):
        for model in (fused, grouped):
            assert model.groups is not None
            model.groups.multipliers = frozen
            model.groups.decay_factors = {"gate": 0.0, "b": 3.0}
            model.set_gradients(seed)
            model.optimizer.step()
    after, expected = fused.snapshot(), grouped.snapshot()
    for tensor in TENSORS:
        kept = rates_of(tensor, device, frozen) == 0
        assert torch.equal(after[tensor]["p"][kept], before[tensor]["p"][kept])
        assert (after[tensor]["m"] != 0).all()
        for key in ("p", "m", "v"):
            ours, theirs = after[tensor][key], expected[tensor][key]
            torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=2e-6)


def test_bf16_and_fp32_gradients(device: str) -> None:
    model = Model("masters", device, "fused")
    for seed in range(3):
        step_and_check(model, "masters", seed, device, bf16=True)
    step_and_check(model, "masters", 3, device, bf16=False)


@EVERY
def test_steps_mix_with_the_optimizers_own_and_states_are_its_own(name: str, device: str) -> None:
    """Against the same optimizer in param groups: weights, states, their names, and counters.

    Every third step has multiplier 1 everywhere, which is the optimizer's own step.
    """
    fused, grouped = (Model(name, device, step) for step in ("fused", "grouped"))
    without: list[list[str]] = [["norm"], [], ["fc1"], ["norm", "down"]]
    for seed in range(20):
        for model in (fused, grouped):
            assert model.groups is not None
            model.groups.multipliers = {} if seed % 3 == 2 else MULTIPLIERS
            model.set_gradients(seed, without[seed % 4])
            model.optimizer.step()
    for tensor in TENSORS:
        one, two = fused.weights(tensor), grouped.weights(tensor)
        torch.testing.assert_close(one, two, rtol=2e-6, atol=2e-6)
        mine, other = (m.optimizer.state[m.tensors[tensor]] for m in (fused, grouped))
        assert list(mine) == list(other)
        for key, value in other.items():
            assert (mine[key].dtype, mine[key].shape) == (value.dtype, value.shape)
            assert mine[key].device == value.device
            if key == "step":
                assert torch.equal(mine[key], value)
    for one, two in zip(fused.optimizer.param_groups, grouped.optimizer.param_groups, strict=True):
        assert {k: v for k, v in one.items() if k != "params"} == {
            k: v for k, v in two.items() if k != "params"
        }


@EVERY
def test_a_first_step_leaves_the_states_of_the_optimizers_own(name: str, device: str) -> None:
    """Also of tensors that never had a gradient."""
    states = []
    for step in ("fused", None):
        model = Model(name, device, step)
        model.set_gradients(0, ["down"])
        model.optimizer.step()
        states.append(
            {
                tensor: list(model.optimizer.state[t]) if t in model.optimizer.state else 0
                for tensor, t in model.tensors.items()
            }
        )
    assert states[0] == states[1]


@EVERY
def test_checkpoints_load_in_both_directions(name: str, device: str) -> None:
    """From fused to plain to fused steps. The loaded optimizers continue as the saved ones."""
    steps: list[Model] = [Model(name, device, "fused")]
    for seed in range(3):
        steps[0].set_gradients(seed)
        steps[0].optimizer.step()
    for step in (None, "fused"):
        saved, loaded = steps[-1], Model(name, device, step)
        for key, weights in loaded.tensors.items():
            weights.copy_(saved.tensors[key])
        loaded.optimizer.load_state_dict(copy.deepcopy(saved.optimizer.state_dict()))
        for tensor in TENSORS:
            assert torch.equal(loaded.weights(tensor), saved.weights(tensor))
        loaded.set_gradients(7)
        loaded.optimizer.step()
        steps.append(loaded)
    last = steps[-1].snapshot()
    assert {float(values["step"]) for values in last.values()} == {5.0}


def test_a_state_loaded_into_a_stepped_optimizer_is_used(device: str) -> None:
    """load_state_dict replaces memory and counters, in place or not."""
    model = Model("torch AdamW", device, "fused")
    saved = None
    for seed in range(4):
        step_and_check(model, "torch AdamW", seed, device)
        if seed == 1:
            saved = copy.deepcopy(model.optimizer.state_dict())
    assert saved is not None
    model.optimizer.load_state_dict(saved)
    step_and_check(model, "torch AdamW", 9, device)
    assert {float(v["step"]) for v in model.snapshot().values()} == {3.0}


def test_a_loaded_state_that_is_not_fp32_is_rejected(device: str) -> None:
    model = Model("torch AdamW", device, "fused")
    model.set_gradients(0)
    model.optimizer.step()
    state = model.optimizer.state[model.tensors["down"]]
    state["exp_avg"] = state["exp_avg"].bfloat16()
    model.set_gradients(1)
    with pytest.raises(RuntimeError, match=r"exp_avg of a \(40, 30\) tensor is torch.bfloat16"):
        model.optimizer.step()


def test_elements_of_no_matrix_have_multiplier_1(device: str) -> None:
    tensor = torch.zeros(100, device=device)
    optimizer = torch.optim.AdamW([tensor], **SETTINGS)
    parts = (("a", ((10, 30), (50, 60))), ("b", ((60, 90),)))
    parts_of = {id(tensor): (SteppedTensor(tensor, torch.nn.Parameter(tensor)), parts)}
    groups = InnerGroups(optimizer, parts_of, decoupled_decay=False, step="fused")
    groups.multipliers = {"a": 2.0, "b": 3.0}
    tensor.grad = torch.ones_like(tensor)
    optimizer.step()
    expected = [1] * 10 + [2] * 20 + [1] * 20 + [2] * 10 + [3] * 30 + [1] * 10
    assert (-tensor / RATE).tolist() == pytest.approx(expected, rel=1e-5)


def test_new_memory_of_tensors_is_stepped(device: str) -> None:
    model = Model("torch AdamW", device, "fused")
    for seed in range(3):
        step_and_check(model, "torch AdamW", seed, device)
        for tensor in model.tensors.values():
            tensor.data = tensor.data.clone()
    assert model.groups is not None


def test_tables_are_built_once(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model("torch AdamW", device, "fused")
    built = []
    original = FusedAdamStep._build
    monkeypatch.setattr(
        FusedAdamStep, "_build", lambda self, groups: (built.append(1), original(self, groups))
    )
    assert model.groups is not None
    for seed in range(6):
        model.groups.multipliers = {m: value + seed for m, value in MULTIPLIERS.items()}
        step_and_check(model, "torch AdamW", seed, device, without=["qkv"] if seed == 3 else [])
    assert len(built) == 1


def test_a_shared_counter_is_cloned_once_with_a_warning(
    device: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = Model("torch AdamW, for loop", device, "fused")
    model.set_gradients(0)
    model.optimizer.step()
    shared = torch.tensor(5.0)
    for state in model.optimizer.state.values():
        state["step"] = shared
    with caplog.at_level(logging.WARNING):
        for seed in range(2):
            model.set_gradients(seed)
            model.optimizer.step()
    assert [float(s["step"]) for s in model.optimizer.state.values()] == [7.0] * len(TENSORS)
    assert sum("shared one step counter" in record.message for record in caplog.records) == 1


def test_twenty_steps_are_those_of_separate_parameters(device: str) -> None:
    fused = Model("torch AdamW", device, "fused")
    apart: dict[tuple[str, str], torch.Tensor] = {}
    for name, (_, parts) in TENSORS.items():
        flat = fused.tensors[name].view(-1)
        for matrix, ranges in parts:
            apart[name, matrix] = torch.cat([flat[a:b] for a, b in ranges])
    groups = [{"params": [t], "lr": RATE * MULTIPLIERS[m]} for (_, m), t in apart.items()]
    separate = torch.optim.AdamW(groups, **SETTINGS)
    for seed in range(20):
        fused.set_gradients(seed)
        for (name, matrix), tensor in apart.items():
            flat = fused.tensors[name].grad.view(-1)  # type: ignore[union-attr]
            ranges = dict(TENSORS[name][1])[matrix]
            tensor.grad = torch.cat([flat[a:b] for a, b in ranges])
        fused.optimizer.step()
        separate.step()
    for (name, matrix), tensor in apart.items():
        flat = fused.tensors[name].view(-1)
        mine = torch.cat([flat[a:b] for a, b in dict(TENSORS[name][1])[matrix]])
        torch.testing.assert_close(mine, tensor, rtol=1e-6, atol=1e-6)


def test_hooks_run_once_and_see_megatrons_groups(device: str) -> None:
    model = Model("torch AdamW", device, "fused")
    seen: list[tuple[str, int]] = []
    optimizer = model.optimizer
    base = optimizer.param_groups
    optimizer.register_step_pre_hook(lambda opt, *_: seen.append(("pre", len(opt.param_groups))))
    optimizer.register_step_post_hook(lambda opt, *_: seen.append(("post", len(opt.param_groups))))
    model.set_gradients(0)
    optimizer.step()
    assert seen == [("pre", 2), ("post", 2)]
    assert optimizer.param_groups is base


@pytest.mark.parametrize("scheduler_first", [True, False])
def test_a_scheduler_of_torch_drives_the_rate(
    device: str, scheduler_first: bool, recwarn: pytest.WarningsRecorder
) -> None:
    tensor = torch.nn.Parameter(torch.ones(8, 6, device=device))
    optimizer = torch.optim.AdamW([tensor], **{**SETTINGS, "weight_decay": 0.0})
    schedulers = []
    if scheduler_first:
        schedulers.append(torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5))
    parts = (("a", ((0, 20),)), ("b", ((20, 48),)))
    parts_of = {id(tensor): (SteppedTensor(tensor, tensor), parts)}
    groups = InnerGroups(optimizer, parts_of, decoupled_decay=False, step="fused")
    if not scheduler_first:
        schedulers.append(torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5))
    groups.multipliers = {"a": 1.0, "b": 2.0}
    moved = []
    for _ in range(2):
        before = tensor.detach().clone()
        tensor.grad = torch.ones_like(tensor)
        optimizer.step()
        schedulers[0].step()
        moved.append((before - tensor.detach()).view(-1))
    # With one gradient always, every step of Adam moves a weight by its rate.
    for rate, change in zip((RATE, RATE / 2), moved, strict=True):
        assert change[:20].tolist() == pytest.approx([rate] * 20, rel=1e-3)
        assert change[20:].tolist() == pytest.approx([2 * rate] * 28, rel=1e-3)
    assert not [w for w in recwarn if "lr_scheduler.step()" in str(w.message)]
    ((rate, tensors),) = groups.base_rates
    assert rate == pytest.approx(RATE / 2)
    assert len(tensors) == 1
    assert tensors[0] is tensor


def test_multiplier_1_everywhere_is_the_optimizers_own_step(device: str) -> None:
    models = [Model("torch AdamW", device, step) for step in ("fused", None)]
    for seed in range(3):
        for model in models:
            if model.groups is not None:
                model.groups.multipliers = dict.fromkeys(MULTIPLIERS, 1.0)
            model.set_gradients(seed)
            model.optimizer.step()
    for tensor in TENSORS:
        assert torch.equal(models[0].tensors[tensor], models[1].tensors[tensor])


class HalfMoments(GroupCounter):
    """Moments in bf16, as Transformer Engine may keep them."""

    def _create_state(self, tensor: torch.Tensor) -> None:
        super()._create_state(tensor)
        self.state[tensor]["exp_avg"] = self.state[tensor]["exp_avg"].bfloat16()


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda t: torch.optim.SGD(t, lr=0.1), "not an Adam optimizer"),
        (lambda t: torch.optim.AdamW(t, amsgrad=True), "amsgrad=True"),
        (lambda t: torch.optim.AdamW(t, maximize=True), "maximize=True"),
        (lambda t: torch.optim.NAdam(t), "its state is|not that of Adam"),
        (lambda t: torch.optim.RAdam(t), "not that of Adam"),
        (lambda t: HalfMoments(t), "exp_avg is torch.bfloat16"),
    ],
)
def test_other_optimizers_are_rejected_with_the_reason(build: Any, words: str, device: str) -> None:
    tensor = torch.zeros(8, 6, device=device)
    optimizer = build([tensor])
    reason = reason_unsupported(optimizer)
    assert reason is not None
    assert not optimizer.state
    assert re.search(words, reason), reason
    parts = {id(tensor): (SteppedTensor(tensor, torch.nn.Parameter(tensor)), (("a", ((0, 48),)),))}
    with pytest.raises(ValueError, match=r"--llr-step fused cannot step .*set --llr-step auto"):
        InnerGroups(optimizer, parts, decoupled_decay=False, step="fused")
    assert InnerGroups(optimizer, parts, decoupled_decay=False)._fused is None


def test_bf16_tensors_without_fp32_weights_are_rejected(device: str) -> None:
    tensor = torch.zeros(8, 6, device=device, dtype=torch.bfloat16)
    reason = reason_unsupported(torch.optim.AdamW([tensor]))
    assert reason is not None
