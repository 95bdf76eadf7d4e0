"""Test steps determine which views and param groups an optimizer can step."""

from typing import Any

import pytest
import torch

from megatron_llr.cpu.adam import GroupStepAdamW
from megatron_llr.matrices.layout import Placement, Span
from megatron_llr.matrices.shard import MatrixShard
from megatron_llr.param_groups.inner_groups import InnerGroups
from megatron_llr.param_groups.layer_groups import LayerGroups
from megatron_llr.param_groups.probe import stepping, takes_new_groups
from megatron_llr.param_groups.stepped_tensor import SteppedTensor
from megatron_llr.param_groups.views import Window, windows
from tests.reference.matrix_ids import shard_of
from tests.unit.fused import OPTIMIZERS, SETTINGS, WatchedAdamW


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
    """A kernel that treats every tensor as contiguous, as fused CUDA kernels do."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=0.1)

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                flat = param.data.as_strided((param.numel(),), (1,))
                flat.sub_(group["lr"] * param.grad.as_strided((param.numel(),), (1,)))


def test_inseparable_matrices_are_reported_with_their_optimizer() -> None:
    fused, apart = torch.nn.Parameter(torch.ones(8, 6)), torch.nn.Parameter(torch.ones(6, 6))

    def shard(matrix: str, parameter: torch.nn.Parameter, first: int, rows: int) -> MatrixShard:
        placement = Placement((Span(first, 0, rows),), 0, 6)
        return shard_of(matrix, parameter, (placement,), rows, 6)

    shards = [shard("gate", fused, 0, 4), shard("up", fused, 4, 4), shard("down", apart, 0, 6)]
    inseparable = {}
    for kind in (WholeMatrix, torch.optim.AdamW):
        optimizer = kind([fused, apart])
        groups = LayerGroups([(optimizer, [SteppedTensor(p, p) for p in (fused, apart)])], shards)
        inseparable[kind.__name__] = groups.inseparable
        # They can be stepped with one multiplier, as the controller then assigns.
        groups.set_multipliers({"gate": 2.0, "up": 2.0, "down": 3.0})
        fused.grad, apart.grad = torch.ones(8, 6), torch.ones(6, 6)
        optimizer.step()
    whole = {"gate": "WholeMatrix", "up": "WholeMatrix"}
    assert inseparable == {"WholeMatrix": whole, "AdamW": {}}


def test_supported_views_do_not_depend_on_the_class_name() -> None:
    def tensor() -> torch.nn.Parameter:
        return torch.nn.Parameter(torch.ones(4, 4))

    for make in OPTIMIZERS.values():
        optimizer = make([{"params": [tensor()]}])
        assert stepping(optimizer) == "strided"
        assert not optimizer.state
    assert stepping(ContiguousOnly([tensor()])) == "contiguous"
    assert stepping(WholeMatrix([tensor()])) == "whole"
    assert stepping(WholeMatrix([{"params": []}])) == "strided"


class PairedGroups(GroupStepAdamW):
    """As apex's FusedAdam: groups are paired with a list that is created at construction."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, **SETTINGS)
        self.param_groups_master = [
            {"params": [None] * len(group["params"])} for group in self.param_groups
        ]

    def step(self, closure: Any = None) -> None:
        groups = self.param_groups
        self.param_groups = [
            {**group, "params": [p for p, _ in zip(group["params"], kept["params"], strict=False)]}
            for group, kept in zip(groups, self.param_groups_master, strict=False)
        ]
        try:
            GroupStepAdamW.step.__wrapped__(self)  # type: ignore[attr-defined]
        finally:
            for group, stepped in zip(groups, self.param_groups, strict=False):
                if group["params"]:
                    group["step"] = stepped["step"]
            self.param_groups = groups


@pytest.mark.parametrize("group_sizes", [(2,), (1, 3), (2, 0, 2)])
def test_groups_that_are_paired_at_construction_leave_no_tensor_unstepped(
    group_sizes: tuple[int, ...],
) -> None:
    """The probe detects it. Whole tensors are stepped at different rates, each exactly once."""
    built = []
    for kind in (PairedGroups, lambda groups: GroupStepAdamW(groups, **SETTINGS)):
        generator = torch.Generator().manual_seed(0)
        groups = [
            [torch.randn(4, 6, generator=generator) for _ in range(size)] for size in group_sizes
        ]
        optimizer = kind([{"params": params} for params in groups])
        tensors = [tensor for params in groups for tensor in params]
        parts = {
            id(t): (SteppedTensor(t, torch.nn.Parameter(t)), ((str(n), ((0, 24),)),))
            for n, t in enumerate(tensors)
        }
        inner = InnerGroups(optimizer, parts, decoupled_decay=False)
        built.append((optimizer, tensors, inner))
    assert stepping(built[0][0]) == "whole"
    assert not takes_new_groups(built[0][0])
    assert takes_new_groups(built[1][0])
    for step in range(4):
        results = []
        for optimizer, tensors, inner in built:
            inner.multipliers = (
                {str(n): 1.0 + n + step for n in range(len(tensors))} if step else {}
            )
            generator = torch.Generator().manual_seed(step)
            for tensor in tensors:
                tensor.grad = torch.randn(4, 6, generator=generator)
            optimizer.step()
            results.append(tensors)
        for paired, plain in zip(*results, strict=True):
            assert torch.equal(paired, plain)
    for paired, plain in zip(built[0][0].param_groups, built[1][0].param_groups, strict=True):
        if paired["params"]:
            assert paired["step"] == plain["step"] == 4


def test_there_are_no_empty_views() -> None:
    """Transformer Engine below 2.18 skips a group that ends in an empty tensor."""
    assert windows([(0, 0), (0, 3), (3, 3), (5, 6)], strided=True) == [
        Window(0, 3, 1, 0),
        Window(5, 1, 1, 0),
    ]
    empty, other = torch.nn.Parameter(torch.ones(0, 6)), torch.nn.Parameter(torch.ones(4, 6))
    optimizer = WatchedAdamW([{"params": [other, empty]}])
    parts = {id(other): (SteppedTensor(other, other), (("a", ((0, 24),)), ("b", ((24, 24),))))}
    groups = InnerGroups(optimizer, parts, decoupled_decay=False)
    groups.multipliers = {"a": 2.0, "b": 3.0}
    other.grad, empty.grad = torch.ones(4, 6), torch.ones(0, 6)
    optimizer.step()
    assert optimizer.seen[-1] == [[24], [0]]


def test_one_group_of_very_many_views_is_probed() -> None:
    """A kernel that steps only a limited number of tensors per call."""

    class Limited(torch.optim.SGD):
        def __init__(self, params: Any) -> None:
            super().__init__(params, lr=0.1)

        def step(self, closure: Any = None) -> None:
            for group in self.param_groups:
                for param in group["params"][:110]:
                    if not param.is_contiguous():
                        raise ValueError("strides are not supported")
                    param.data.sub_(group["lr"] * param.grad)

    assert stepping(Limited([torch.nn.Parameter(torch.ones(4, 4))])) == "whole"
