"""Layer groups on real torch optimizers: their effect on groups, state and other hooks."""

import math
from typing import Any

import pytest
import torch

from megatron_llr.param_groups.inner_groups import InnerGroups
from megatron_llr.param_groups.step_recorder import StepRecorder
from tests.unit.fused import MULTIPLIERS, OPTIMIZERS, RANGES, SETTINGS, WatchedAdamW, fused_groups


def test_equal_multipliers_share_a_group_and_adjacent_ones_a_view() -> None:
    tensor = torch.nn.Parameter(torch.ones(40))
    optimizer = WatchedAdamW([{"params": [tensor]}])
    groups = fused_groups(optimizer, tensor, {str(n): [(10 * n, 10 * n + 10)] for n in range(4)})
    for values in ((2, 2, 3, 3), (2, 3, 2, 3), (2, 2, 2, 2)):
        groups.multipliers = {str(n): float(value) for n, value in enumerate(values)}
        tensor.grad = torch.ones(40)
        optimizer.step()
    # Every second expert: one view with a stride.
    # The steps of the copies that the probe makes are recorded here too.
    assert optimizer.seen[-3:] == [[[20], [20]], [[20], [20]], [[40]]]


def test_a_ramp_moves_multipliers_without_new_views() -> None:
    tensor = torch.nn.Parameter(torch.ones(8, 6))
    optimizer = OPTIMIZERS["adamw"]([{"params": [tensor]}])
    groups = fused_groups(optimizer, tensor, RANGES)
    plans = []
    for step in range(3):
        groups.multipliers = {matrix: value + step for matrix, value in MULTIPLIERS.items()}
        tensor.grad = torch.ones(8, 6)
        optimizer.step()
        plans.append(groups.grouped.plan)
    assert plans[0] is plans[1] is plans[2]


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_state_is_that_of_a_plain_optimizer(kind: str) -> None:
    """Keys, shapes and counters as without the extension, so checkpoints are the same."""
    dicts = []
    for extended in (True, False):
        tensor = torch.nn.Parameter(torch.ones(8, 6))
        # SGD's decay enters its momentum, and with it the weights, which differ.
        decay = {"weight_decay": 0.0} if kind == "sgd" else {}
        optimizer = OPTIMIZERS[kind]([{"params": [tensor], **decay}])
        if extended:
            fused_groups(optimizer, tensor, RANGES)
        for _ in range(3):
            tensor.grad = torch.full((8, 6), 0.5)
            optimizer.step()
        dicts.append(optimizer.state_dict())
    extended_state, plain_state = (state_dict["state"][0] for state_dict in dicts)
    assert list(extended_state) == list(plain_state)
    for key, value in plain_state.items():
        if isinstance(value, torch.Tensor):
            assert extended_state[key].shape == value.shape
            assert torch.equal(extended_state[key], value), key
    assert dicts[0]["param_groups"] == dicts[1]["param_groups"]


def test_a_loaded_state_is_used() -> None:
    """After load_state_dict the cached views of the old state must not be used."""
    runs = []
    for reload in (False, True):
        tensor = torch.nn.Parameter(torch.ones(8, 6))
        optimizer = OPTIMIZERS["adamw"]([{"params": [tensor]}])
        fused_groups(optimizer, tensor, RANGES)
        generator = torch.Generator().manual_seed(3)
        for _ in range(4):
            if reload:
                optimizer.load_state_dict(optimizer.state_dict())
            tensor.grad = torch.randn(8, 6, generator=generator)
            optimizer.step()
        runs.append(tensor.detach().clone())
    assert torch.equal(*runs)


def test_new_memory_of_a_tensor_is_noticed() -> None:
    """Offloading and reloading replace `.data`. A step of views of the old memory would be lost."""
    runs = []
    for moved in (False, True):
        tensor = torch.nn.Parameter(torch.ones(8, 6))
        optimizer = OPTIMIZERS["adamw"]([{"params": [tensor]}])
        fused_groups(optimizer, tensor, RANGES)
        for _ in range(3):
            tensor.grad = torch.ones(8, 6)
            optimizer.step()
            if moved:
                tensor.data = tensor.data.clone()
        runs.append(tensor.detach().clone())
    assert torch.equal(*runs)


def test_no_copy_of_weights_or_state_is_kept() -> None:
    tensor = torch.nn.Parameter(torch.ones(8, 6))
    optimizer = OPTIMIZERS["adamw"]([{"params": [tensor]}])
    groups = fused_groups(optimizer, tensor, RANGES)
    for _ in range(2):
        tensor.grad = torch.ones(8, 6)
        optimizer.step()
    (fused,) = groups.grouped.views.values()
    storage = {tensor.untyped_storage().data_ptr()}
    assert {v.untyped_storage().data_ptr() for vs in fused.views.values() for v in vs} == storage
    state = optimizer.state[tensor]
    for lent in fused._states:
        for key in ("exp_avg", "exp_avg_sq"):
            storages = [each[key].untyped_storage().data_ptr() for each in (lent, state)]
            assert storages[0] == storages[1]


class Nested(torch.optim.AdamW):
    """An optimizer whose step calls its parent's: torch fires the step hooks twice."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


def test_a_nested_step_applies_multipliers_once() -> None:
    results = []
    for kind in (torch.optim.AdamW, Nested):
        tensor = torch.nn.Parameter(torch.ones(8, 6))
        optimizer = kind([{"params": [tensor]}], **SETTINGS)
        fused_groups(optimizer, tensor, RANGES)
        for _ in range(2):
            tensor.grad = torch.ones(8, 6)
            optimizer.step()
        results.append(tensor.detach().clone())
    assert torch.equal(*results)


def test_a_failing_step_leaves_megatrons_groups_and_the_next_step_works() -> None:
    class Fragile(torch.optim.AdamW):
        broken = False

        def step(self, closure: Any = None) -> Any:
            if self.broken:
                assert len(self.param_groups) == 3
                raise RuntimeError("boom")
            return super().step(closure)

    tensor = torch.nn.Parameter(torch.ones(8, 6))
    optimizer = Fragile([{"params": [tensor]}], **SETTINGS)
    fused_groups(optimizer, tensor, RANGES)
    base, state = optimizer.param_groups, optimizer.state
    for broken in (False, True, False):
        tensor.grad = torch.ones(8, 6)
        optimizer.broken = broken
        if broken:
            with pytest.raises(RuntimeError, match="boom"):
                optimizer.step()
        else:
            optimizer.step()
        assert optimizer.param_groups is base
        assert optimizer.state is state
    assert float(optimizer.state[tensor]["step"]) == 2


def test_other_hooks_never_see_the_layer_groups() -> None:
    tensor = torch.nn.Parameter(torch.ones(8, 6))
    optimizer = OPTIMIZERS["adamw"]([{"params": [tensor]}])
    seen = []
    optimizer.register_step_pre_hook(lambda opt, *_: seen.append(len(opt.param_groups)))
    optimizer.register_step_post_hook(lambda opt, *_: seen.append(len(opt.param_groups)))
    fused_groups(optimizer, tensor, RANGES)
    tensor.grad = torch.ones(8, 6)
    optimizer.step()
    assert seen == [1, 1]


@pytest.mark.parametrize("decoupled", [False, True])
def test_weight_decay_scales_with_the_multiplier_or_does_not(decoupled: bool) -> None:
    """With no gradient but decay, W shrinks by lr * multiplier * wd, or by lr * wd."""
    tensor = torch.nn.Parameter(torch.ones(8, 6, dtype=torch.float64))
    optimizer = OPTIMIZERS["adamw"]([{"params": [tensor]}])
    fused_groups(optimizer, tensor, RANGES, decoupled_decay=decoupled)
    tensor.grad = torch.zeros(8, 6, dtype=torch.float64)
    optimizer.step()
    flat = tensor.detach().view(-1)
    for matrix, ranges in RANGES.items():
        factor = 1.0 if decoupled else MULTIPLIERS[matrix]
        for first, last in ranges:
            assert flat[first:last].tolist() == pytest.approx(
                [1 - 0.01 * 0.1 * factor] * (last - first), rel=1e-12
            )


def recorder_of(groups: InnerGroups) -> StepRecorder:
    sources = [(groups, list(groups.parts.values()))]
    return StepRecorder(sources, list(RANGES), torch.device("cpu"), updates=True)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_changes_by_a_step_are_recorded_per_matrix(kind: str) -> None:
    """Without layer groups (before the first multipliers), with them, and only when armed."""
    tensor = torch.nn.Parameter(torch.randn(8, 6, generator=torch.Generator().manual_seed(1)))
    optimizer = OPTIMIZERS[kind]([{"params": [tensor]}])
    groups = fused_groups(optimizer, tensor, RANGES)
    recorder = recorder_of(groups)
    for armed, multipliers in ((False, {}), (True, {}), (True, MULTIPLIERS), (False, MULTIPLIERS)):
        groups.multipliers = multipliers
        recorder.arm(record=armed)
        tensor.grad = torch.ones(8, 6)
        before = tensor.detach().double().view(-1).clone()
        optimizer.step()
        moved = tensor.detach().double().view(-1) - before
        sums, later = recorder.local_sums(), recorder.local_sums()
        assert later.recorded.tolist() == later.changes.tolist() == [0.0] * 3
        after = tensor.detach().double().view(-1)
        counts = [sum(last - first for first, last in ranges) for ranges in RANGES.values()]
        assert sums.elements.tolist() == counts
        assert sums.recorded.tolist() == (counts if armed else [0.0] * 3)
        for recorded, flat in ((sums.squares, after), (sums.changes, moved * armed)):
            assert recorded.tolist() == [
                pytest.approx(sum(float(flat[a:b].square().sum()) for a, b in ranges), rel=1e-5)
                for ranges in RANGES.values()
            ]
        rates = (sums.weighted_rates / sums.elements).tolist()
        # No rate is known before the first step with layer groups.
        assert rates == pytest.approx([0.01 if multipliers else math.nan] * 3, nan_ok=True)


def test_a_failing_step_leaves_no_record() -> None:
    class Broken(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            raise RuntimeError("boom")

    tensor = torch.nn.Parameter(torch.ones(8, 6))
    optimizer = Broken([tensor], lr=0.1)
    groups = fused_groups(optimizer, tensor, RANGES)
    groups.multipliers = {}
    recorder = recorder_of(groups)
    recorder.arm(record=True)
    with pytest.raises(RuntimeError, match="boom"):
        optimizer.step()
    assert recorder.local_sums().recorded.tolist() == [0.0] * 3
