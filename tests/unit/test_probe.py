"""What optimizers take, found out by asking them."""

from typing import Any

import pytest
import torch

from megatron_llr.matrices.layout import Placement, Span
from megatron_llr.matrices.shard import MatrixShard
from megatron_llr.param_groups.layer_groups import LayerGroups
from megatron_llr.param_groups.probe import stepping
from megatron_llr.param_groups.stepped_tensor import SteppedTensor
from tests.unit.fused import OPTIMIZERS


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


class GroupsOfConstruction(torch.optim.SGD):
    """Pairs its groups with a list made at construction, as apex's FusedAdam does: others stay."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=0.1)
        self.param_groups_master = [None for _ in self.param_groups]

    def step(self, closure: Any = None) -> None:
        for group, _ in zip(self.param_groups, self.param_groups_master, strict=False):
            for param in group["params"]:
                param.data.sub_(group["lr"] * param.grad)


@pytest.mark.parametrize("groups", [1, 2, 3])
def test_an_optimizer_that_steps_only_the_groups_of_its_construction_gets_no_others(
    groups: int,
) -> None:
    """No tensor is left unstepped: it falls to the next way of stepping."""
    tensors = [torch.nn.Parameter(torch.ones(4, 6)) for _ in range(groups)]
    optimizer = GroupsOfConstruction([{"params": [tensor]} for tensor in tensors])
    assert stepping(optimizer) == "whole"


@pytest.mark.parametrize("groups", [1, 4])
def test_the_probe_steps_more_groups_than_the_optimizer_has(groups: int) -> None:
    tensors = [torch.nn.Parameter(torch.ones(4, 6)) for _ in range(groups)]
    optimizer = torch.optim.AdamW([{"params": [tensor]} for tensor in tensors])
    assert stepping(optimizer) == "strided"


def test_what_cannot_be_stepped_in_parts_is_reported_with_the_optimizer_that_demands_it() -> None:
    fused, apart = torch.nn.Parameter(torch.ones(8, 6)), torch.nn.Parameter(torch.ones(6, 6))

    def shard(matrix: str, parameter: torch.nn.Parameter, first: int, rows: int) -> MatrixShard:
        placement = Placement((Span(first, 0, rows),), 0, 6)
        return MatrixShard(matrix, "c", parameter, rows, 6, (placement,), (0,), None)

    shards = [shard("gate", fused, 0, 4), shard("up", fused, 4, 4), shard("down", apart, 0, 6)]
    found = {}
    for kind in (WholeMatrix, torch.optim.AdamW):
        optimizer = kind([fused, apart])
        groups = LayerGroups([(optimizer, [SteppedTensor(p, p) for p in (fused, apart)])], shards)
        found[kind.__name__] = groups.inseparable
        # Shared, as the controller then makes them, they step.
        groups.set_multipliers({"gate": 2.0, "up": 2.0, "down": 3.0})
        fused.grad, apart.grad = torch.ones(8, 6), torch.ones(6, 6)
        optimizer.step()
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
