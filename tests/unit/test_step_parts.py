"""Matrices in one tensor stepped at different rates, against the same matrices as parameters."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_llr.matrices.layout import flat_ranges, interleaved
from megatron_llr.param_groups.views import windows
from tests.unit.fused import MULTIPLIERS, OPTIMIZERS, fused_groups


@given(data=st.data())
def test_windows_cover_the_ranges_with_few_views(data: st.DataObject) -> None:
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
            chosen = windows(ranges, strided=strided)
            covered = torch.cat([numbers[:0], *(w.of(numbers).flatten() for w in chosen)])
            assert torch.equal(covered, expected)
            assert len(chosen) <= (3 if strided else len(ranges))


@pytest.mark.parametrize("kind", OPTIMIZERS)
@given(data=st.data())
def test_fused_is_bitwise_separate(kind: str, data: st.DataObject) -> None:
    """q, k, v in any slice of a fused weight step as separate parameters with their gradients."""
    heads, columns = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 5))
    spans = interleaved([("q", 4), ("k", 2), ("v", 2)], heads, 0, 8 * heads)
    size = 8 * heads * columns
    start = data.draw(st.integers(0, size - 1))
    stop = data.draw(st.integers(start + 1, size))
    ranges = {m: flat_ranges(runs, columns, start, stop) for m, runs in spans.items()}
    ranges = {matrix: runs for matrix, runs in ranges.items() if runs}
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


def halve_state(optimizer: torch.optim.Optimizer) -> None:
    """Load in place, as some checkpoints are: other values in the same tensors."""
    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, torch.Tensor):
                value.copy_((value / 2).ceil() if value.numel() == 1 else value / 2)


# Multipliers of three experts. Few patterns, so that they recur and cached plans are used again.
PATTERNS = ((), (1.0, 1.0, 1.0), (5.0, 5.0, 5.0), (1.0, 5.0, 5.0), (5.0, 1.0, 5.0), (2.0, 5.0, 1.0))
EVENTS = ("none", "group joins", "loaded", "loaded in place", "other memory", "no gradient")


@pytest.mark.parametrize("kind", OPTIMIZERS)
@given(data=st.data())
def test_changes_between_steps_are_bitwise_separate(kind: str, data: st.DataObject) -> None:
    """Three adjacent experts with other multipliers in each step. Experts of equal multiplier share
    a group, and a view if they are adjacent. Changes of the tensors between steps are noticed.
    """
    experts = [f"expert.{number}" for number in range(3)]
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    whole, norm, late = (torch.randn(size, generator=generator) for size in (18, 4, 3))
    apart = [part.clone() for part in whole.split(6)]
    others = [norm.clone(), late.clone()]
    optimizer = OPTIMIZERS[kind]([{"params": [whole, norm]}])
    ranges = {expert: [(6 * n, 6 * n + 6)] for n, expert in enumerate(experts)}
    groups = fused_groups(optimizer, whole, ranges)
    separate = OPTIMIZERS[kind]([{"params": [tensor]} for tensor in (*apart, others[0])])
    # Megatron's gradients are in a persistent buffer. In plain torch each step has new ones.
    buffer = torch.zeros(18) if data.draw(st.booleans()) else None
    if buffer is not None:
        whole.main_grad = buffer
    joined = False
    for _ in range(6):
        pattern = data.draw(st.sampled_from(PATTERNS))
        chosen = dict(zip(experts, pattern, strict=False))
        groups.multipliers = chosen
        event = data.draw(st.sampled_from(EVENTS))
        if event == "group joins" and not joined:
            joined = True
            optimizer.add_param_group({"params": [late]})
            separate.add_param_group({"params": [others[1]]})
        elif event == "loaded":
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        elif event == "loaded in place":
            halve_state(optimizer)
            halve_state(separate)
        elif event == "other memory":
            whole.data = whole.data.clone()
        gradient = torch.randn(18, generator=generator)
        whole.grad = gradient if buffer is None else buffer.copy_(gradient)
        for tensor, part in zip(apart, gradient.split(6), strict=True):
            tensor.grad = part.clone()
        if event == "no gradient":
            for tensor in (whole, *apart):
                tensor.grad = None
        for n, expert in enumerate(experts):
            separate.param_groups[n]["lr"] = 0.01 * chosen.get(expert, 1.0)
        norm.grad = late.grad = None
        for mine, other in zip((norm, late), others, strict=True):
            mine.grad = torch.randn(mine.shape, generator=generator)
            other.grad = mine.grad.clone()
        optimizer.step()
        separate.step()
        assert torch.equal(whole, torch.cat(apart))
        assert torch.equal(norm, others[0])
        assert torch.equal(late, others[1])


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("between", [{"q": 3.0, "k": 3.0}, {}], ids=["equal", "none"])
def test_a_step_of_the_whole_tensor_is_counted_in_the_views(
    kind: str, between: dict[str, float]
) -> None:
    """Adam's step counter is copied per view, so a step of the whole tensor must update it."""
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(12, generator=generator)
    apart = [part.clone() for part in whole.split(6)]
    optimizer = OPTIMIZERS[kind]([{"params": [whole]}])
    groups = fused_groups(optimizer, whole, {"q": [(0, 6)], "k": [(6, 12)]})
    separate = OPTIMIZERS[kind]([{"params": [part]} for part in apart])
    different = {"q": 2.0, "k": 1.0}
    for multipliers in (different, different, between, between, different):
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
