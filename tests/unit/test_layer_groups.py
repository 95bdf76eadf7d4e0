"""Layer groups on real torch optimizers, against the same matrices as separate parameters."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_llr.optim.capability import stepping
from megatron_llr.optim.layer_groups import InnerGroups, LayerGroups
from megatron_llr.optim.masters import Master
from megatron_llr.optim.updates import UpdateRecorder
from megatron_llr.optim.views import windows
from megatron_llr.runtime.cpu_adam import GroupStepAdamW
from megatron_llr.sharding.layout import Placement, Span, flat_ranges, interleaved
from megatron_llr.sharding.shard import MatrixShard

SETTINGS = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
MULTIPLIERS = {"q": 1.5, "k": 5.0, "v": 0.25}
OPTIMIZERS: dict[str, Any] = {
    "adamw": lambda groups: torch.optim.AdamW(groups, foreach=False, **SETTINGS),
    "adamw-foreach": lambda groups: torch.optim.AdamW(groups, foreach=True, **SETTINGS),
    "group-step": lambda groups: GroupStepAdamW(groups, **SETTINGS),
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.01, momentum=0.9, weight_decay=0.1),
}


def fused_groups(
    optimizer: torch.optim.Optimizer,
    tensor: torch.Tensor,
    ranges: dict[str, Sequence[tuple[int, int]]],
    *,
    decoupled_decay: bool = False,
) -> InnerGroups:
    """Layer groups of one fused tensor."""
    parts = tuple((matrix, tuple(found)) for matrix, found in ranges.items())
    master = Master(tensor, torch.nn.Parameter(tensor))
    groups = InnerGroups(optimizer, {id(tensor): (master, parts)}, decoupled_decay=decoupled_decay)
    groups.multipliers = MULTIPLIERS
    return groups


@given(data=st.data())
def test_windows_show_the_ranges_in_few_views(data: st.DataObject) -> None:
    heads, columns = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 4))
    spans = interleaved([("q", 4), ("k", 2)], heads, 0, 6 * heads)
    size = 6 * heads * columns
    start = data.draw(st.integers(0, size - 1))
    stop = data.draw(st.integers(start + 1, size))
    numbers = torch.arange(stop - start)
    for runs in spans.values():
        ranges = flat_ranges(runs, columns, start, stop)
        expected = torch.cat([numbers[:0], *(numbers[first:last] for first, last in ranges)])
        for strided in (False, True):
            found = windows(ranges, strided=strided)
            shown = torch.cat([numbers[:0], *(window.of(numbers).flatten() for window in found)])
            assert torch.equal(shown, expected)
            assert len(found) <= (3 if strided else len(ranges))


@pytest.mark.parametrize("kind", OPTIMIZERS)
@given(data=st.data())
def test_fused_is_bitwise_separate(kind: str, data: st.DataObject) -> None:
    """q, k, v fused, in a slice cut anywhere, step as q, k, v apart with the same gradients."""
    heads, columns = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 5))
    spans = interleaved([("q", 4), ("k", 2), ("v", 2)], heads, 0, 8 * heads)
    size = 8 * heads * columns
    start = data.draw(st.integers(0, size - 1))
    stop = data.draw(st.integers(start + 1, size))
    ranges = {m: flat_ranges(runs, columns, start, stop) for m, runs in spans.items()}
    ranges = {matrix: found for matrix, found in ranges.items() if found}
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    fused = torch.randn(stop - start, generator=generator)
    norm = torch.randn(7, generator=generator)

    def gather(tensor: torch.Tensor, matrix: str) -> torch.Tensor:
        return torch.cat([tensor[first:last] for first, last in ranges[matrix]])

    apart = {matrix: gather(fused, matrix).clone() for matrix in ranges}
    other_norm = norm.clone()
    optimizer = OPTIMIZERS[kind]([{"params": [fused, norm]}])
    fused_groups(optimizer, fused, ranges)
    separate = OPTIMIZERS[kind](
        [{"params": [apart[m]], "lr": 0.01 * MULTIPLIERS[m]} for m in ranges]
        + [{"params": [other_norm]}]
    )
    for _ in range(4):
        fused.grad = torch.randn(fused.shape, generator=generator)
        norm.grad = torch.randn(7, generator=generator)
        for matrix, tensor in apart.items():
            tensor.grad = gather(fused.grad, matrix)
        other_norm.grad = norm.grad.clone()
        optimizer.step()
        separate.step()
        for matrix, tensor in apart.items():
            assert torch.equal(gather(fused, matrix), tensor), matrix
        assert torch.equal(norm, other_norm)
    assert set(optimizer.state) == {fused, norm}
    assert [len(group["params"]) for group in optimizer.param_groups] == [2]


@pytest.mark.parametrize("kind", OPTIMIZERS)
@given(data=st.data())
def test_multipliers_that_meet_and_part_are_bitwise_separate(
    kind: str, data: st.DataObject
) -> None:
    """Five experts side by side, each step with other multipliers: those that are equal share a
    group, and a view where they touch; a group that joins later and a loaded state are seen.
    """
    experts = [f"expert.{number}" for number in range(5)]
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    whole, norm, late = (torch.randn(size, generator=generator) for size in (30, 4, 3))
    apart = {expert: whole[6 * n : 6 * n + 6].clone() for n, expert in enumerate(experts)}
    others = [norm.clone(), late.clone()]
    optimizer = OPTIMIZERS[kind]([{"params": [whole, norm]}])
    ranges = {expert: [(6 * n, 6 * n + 6)] for n, expert in enumerate(experts)}
    groups = fused_groups(optimizer, whole, ranges)
    separate = OPTIMIZERS[kind]([{"params": [t]} for t in (*apart.values(), others[0])])
    joins, loads = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 3))
    for step in range(6):
        # Often all equal, so that steps of the whole tensor lie between those of its parts.
        kinds = data.draw(st.sampled_from([[1.0], [5.0], [1.0, 5.0], [1.0, 2.0, 5.0]]))
        chosen = {e: data.draw(st.sampled_from(kinds)) for e in experts}
        groups.multipliers = chosen
        if step == joins:
            optimizer.add_param_group({"params": [late]})
            separate.add_param_group({"params": [others[1]]})
        if step == loads:
            optimizer.load_state_dict(optimizer.state_dict())
        whole.grad = torch.randn(30, generator=generator)
        norm.grad = late.grad = None
        for n, (expert, tensor) in enumerate(apart.items()):
            tensor.grad = whole.grad[6 * n : 6 * n + 6].clone()
            separate.param_groups[n]["lr"] = 0.01 * chosen[expert]
        for mine, other in zip((norm, late), others, strict=True):
            mine.grad = torch.randn(mine.shape, generator=generator)
            other.grad = mine.grad.clone()
        optimizer.step()
        separate.step()
        assert torch.equal(whole, torch.cat(list(apart.values())))
        assert torch.equal(norm, others[0])
        if step >= joins:
            assert torch.equal(late, others[1])


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("between", [{"q": 3.0, "k": 3.0}, {}], ids=["equal", "none"])
def test_a_step_taken_whole_counts_when_the_parts_come_apart_again(
    kind: str, between: dict[str, float]
) -> None:
    """Adam's step number is kept per view: a step of the whole tensor must reach it."""
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(12, generator=generator)
    apart = [part.clone() for part in whole.split(6)]
    optimizer = OPTIMIZERS[kind]([{"params": [whole]}])
    groups = fused_groups(optimizer, whole, {"q": [(0, 6)], "k": [(6, 12)]})
    separate = OPTIMIZERS[kind]([{"params": [part]} for part in apart])
    cut = {"q": 2.0, "k": 1.0}
    for multipliers in (cut, cut, between, between, cut):
        groups.multipliers = multipliers
        whole.grad = torch.randn(12, generator=generator)
        gradients = whole.grad.split(6)
        for matrix, part, gradient, group in zip(
            "qk", apart, gradients, separate.param_groups, strict=True
        ):
            part.grad = gradient.clone()
            group["lr"] = 0.01 * multipliers.get(matrix, 1.0)
        optimizer.step()
        separate.step()
        assert torch.equal(whole, torch.cat(apart))


def test_equal_multipliers_share_a_group_and_touching_ones_a_view() -> None:
    tensor = torch.nn.Parameter(torch.ones(40))
    optimizer = OPTIMIZERS["adamw"]([{"params": [tensor]}])
    groups = fused_groups(optimizer, tensor, {str(n): [(10 * n, 10 * n + 10)] for n in range(4)})
    seen: list[list[int]] = []
    # After that of the layer groups.
    optimizer.register_step_pre_hook(
        lambda opt, *_: seen.append([len(group["params"]) for group in opt.param_groups])
    )
    for values in ((2, 2, 3, 3), (2, 3, 2, 3), (2, 2, 2, 2)):
        groups.multipliers = {str(n): float(value) for n, value in enumerate(values)}
        tensor.grad = torch.ones(40)
        optimizer.step()
    # Every second expert: one view with a stride.
    assert seen == [[1, 1], [1, 1], [1]]


def test_a_ramp_moves_multipliers_without_new_views() -> None:
    tensor = torch.nn.Parameter(torch.ones(8, 6))
    optimizer = OPTIMIZERS["adamw"]([{"params": [tensor]}])
    groups = fused_groups(optimizer, tensor, RANGES)
    plans = []
    for step in range(3):
        groups.multipliers = {matrix: value + step for matrix, value in MULTIPLIERS.items()}
        tensor.grad = torch.ones(8, 6)
        optimizer.step()
        plans.append(groups._plan)
    assert plans[0] is plans[1] is plans[2]


RANGES = {"q": [(0, 12), (24, 36)], "k": [(12, 18), (36, 42)], "v": [(18, 24), (42, 48)]}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_state_is_that_of_a_plain_optimizer(kind: str) -> None:
    """Keys, shapes and counters as without the extension, so checkpoints are too."""
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
    extended_state, plain_state = (found["state"][0] for found in dicts)
    assert list(extended_state) == list(plain_state)
    for key, value in plain_state.items():
        if isinstance(value, torch.Tensor):
            assert extended_state[key].shape == value.shape
            assert torch.equal(extended_state[key], value), key
    assert dicts[0]["param_groups"] == dicts[1]["param_groups"]


def test_a_loaded_state_is_taken_up() -> None:
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


def test_a_tensor_given_other_memory_is_seen_anew() -> None:
    """Offloading and reloading re-point `.data`; views of the old memory would step nothing."""
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
    (fused,) = groups._fused.values()
    storage = {tensor.untyped_storage().data_ptr()}
    assert {v.untyped_storage().data_ptr() for vs in fused.views.values() for v in vs} == storage
    state = optimizer.state[tensor]
    for lent in fused._states:
        for key in ("exp_avg", "exp_avg_sq"):
            storages = [found[key].untyped_storage().data_ptr() for found in (lent, state)]
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
    optimizer.register_step_post_hook(lambda opt, *_: seen.append(len(opt.param_groups)))
    fused_groups(optimizer, tensor, RANGES)
    tensor.grad = torch.ones(8, 6)
    optimizer.step()
    assert seen == [1]


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


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_what_a_step_changes_is_recorded_per_matrix(kind: str) -> None:
    """Without layer groups (before the first multipliers), with them, and only when armed."""
    tensor = torch.nn.Parameter(torch.randn(8, 6, generator=torch.Generator().manual_seed(1)))
    optimizer = OPTIMIZERS[kind]([{"params": [tensor]}])
    groups = fused_groups(optimizer, tensor, RANGES)
    groups.recorder = UpdateRecorder(list(groups.parts.values()))
    for armed, multipliers in ((False, {}), (True, {}), (True, MULTIPLIERS), (False, MULTIPLIERS)):
        groups.recorder.armed, groups.multipliers = armed, multipliers
        tensor.grad = torch.ones(8, 6)
        before = tensor.detach().double().view(-1).clone()
        optimizer.step()
        moved = tensor.detach().double().view(-1) - before
        found = {matrix: (count, float(sum_)) for matrix, count, sum_ in groups.recorder.take()}
        assert groups.recorder.take() == []
        expected = {
            matrix: (
                sum(last - first for first, last in ranges),
                pytest.approx(sum(float(moved[a:b].square().sum()) for a, b in ranges), rel=1e-5),
            )
            for matrix, ranges in RANGES.items()
        }
        assert found == (expected if armed else {})


def test_a_failing_step_leaves_no_record() -> None:
    class Broken(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            raise RuntimeError("boom")

    tensor = torch.nn.Parameter(torch.ones(8, 6))
    optimizer = Broken([tensor], lr=0.1)
    groups = fused_groups(optimizer, tensor, RANGES)
    groups.multipliers = {}
    groups.recorder = UpdateRecorder(list(groups.parts.values()))
    groups.recorder.armed = True
    with pytest.raises(RuntimeError, match="boom"):
        optimizer.step()
    assert groups.recorder.take() == []


class WholeMatrix(torch.optim.Optimizer):
    """An update of whole matrices, as Muon's: each row by the norm of the matrix."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    param.data.sub_(group["lr"] * param.grad / param.grad.norm())


class ContiguousOnly(torch.optim.SGD):
    """A kernel that takes any tensor for contiguous, as fused CUDA kernels do."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=0.1)

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                flat = param.data.as_strided((param.numel(),), (1,))
                flat.sub_(group["lr"] * param.grad.as_strided((param.numel(),), (1,)))


def test_what_cannot_be_stepped_in_parts_is_reported_with_the_optimizer_that_demands_it() -> None:
    fused, apart = torch.nn.Parameter(torch.ones(8, 6)), torch.nn.Parameter(torch.ones(6, 6))

    def shard(matrix: str, parameter: torch.nn.Parameter, first: int, rows: int) -> MatrixShard:
        placement = Placement((Span(first, 0, rows),), 0, 6)
        return MatrixShard(matrix, "c", parameter, rows, 6, (placement,), (0,), None)

    shards = [shard("gate", fused, 0, 4), shard("up", fused, 4, 4), shard("down", apart, 0, 6)]
    found = {}
    for kind in (WholeMatrix, torch.optim.AdamW):
        leaf = SimpleNamespace(optimizer=kind([fused, apart]))
        groups = LayerGroups(leaf, shards)
        found[kind.__name__] = groups.inseparable
        # Shared, as the controller then makes them, they step.
        groups.set_multipliers({"gate": 2.0, "up": 2.0, "down": 3.0})
        fused.grad, apart.grad = torch.ones(8, 6), torch.ones(6, 6)
        leaf.optimizer.step()
    assert found == {"WholeMatrix": {"gate": "WholeMatrix", "up": "WholeMatrix"}, "AdamW": {}}


def test_capability_is_asked_not_known_by_name() -> None:
    def tensor() -> torch.nn.Parameter:
        return torch.nn.Parameter(torch.ones(4, 4))

    for make in OPTIMIZERS.values():
        optimizer = make([{"params": [tensor()]}])
        assert stepping(optimizer) == "strided"
        assert not optimizer.state
    assert stepping(ContiguousOnly([tensor()])) == "contiguous"
    assert stepping(WholeMatrix([tensor()])) == "whole"
    assert stepping(WholeMatrix([{"params": []}])) == "strided"
