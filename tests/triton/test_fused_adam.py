"""The fused way of stepping against each optimizer's own formula and its own step."""

import copy
from typing import Any

import pytest
import torch

from megatron_llr.param_groups.fused_adam import AdamKind, recognize
from megatron_llr.param_groups.inner_groups import InnerGroups
from megatron_llr.param_groups.stepped_tensor import SteppedTensor

EPSILON = 2.0**-23
BETAS, EPS = (0.9, 0.95), 1e-8
# Interleaved projections with a run that begins inside a row, two stacked matrices, one whole.
PARTS = {
    "qkv": (
        (24, 50),
        (
            ("q", ((0, 300), (600, 900))),
            ("k", ((300, 425), (900, 1025))),
            ("v", ((425, 600), (1025, 1200))),
        ),
    ),
    "fc1": ((300, 70), (("gate", ((0, 10500),)), ("up", ((10500, 21000),)))),
    "down": ((40, 30), (("down", ((0, 1200),)),)),
    "norm": ((70,), ()),
}
MULTIPLIERS = {"q": 1.5, "k": 5.0, "v": 0.25, "gate": 2.0, "up": 3.0, "down": 0.5}


class GroupCounter(torch.optim.Optimizer):
    """The order of operations of apex and Transformer Engine, with the counter in the group."""

    def __init__(self, params: Any, decoupled: bool = True) -> None:
        defaults = {"lr": 0.01, "betas": BETAS, "eps": EPS, "weight_decay": 0.1}
        super().__init__(params, defaults)
        self.decoupled = decoupled

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            if not group["params"]:
                continue
            group["step"] = group.get("step", 0) + 1
            b1, b2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state, g = self.state[p], p.grad
                if not state:
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
                if not self.decoupled:
                    g = g + group["weight_decay"] * p
                m = state["exp_avg"].mul_(b1).add_(g, alpha=1 - b1)
                v = state["exp_avg_sq"].mul_(b2).add_(g * g, alpha=1 - b2)
                first, second = 1 - b1 ** group["step"], 1 - b2 ** group["step"]
                update = (m / first) / ((v / second).sqrt() + EPS)
                if self.decoupled:
                    update = update + group["weight_decay"] * p
                p.sub_(update, alpha=group["lr"])


def torch_adam(kind: Any, **options: Any) -> Any:
    return lambda groups: kind(groups, lr=0.01, betas=BETAS, eps=EPS, weight_decay=0.1, **options)


OPTIMIZERS: dict[str, Any] = {
    "torch AdamW": torch_adam(torch.optim.AdamW),
    "torch AdamW, foreach": torch_adam(torch.optim.AdamW, foreach=True),
    "torch Adam": torch_adam(torch.optim.Adam),
    "group counter, AdamW": lambda groups: GroupCounter(groups),
    "group counter, L2": lambda groups: GroupCounter(groups, decoupled=False),
}


class Model:
    """An optimizer over the tensors of `PARTS`, in two groups, with layer groups if asked."""

    def __init__(self, build: Any, device: str, way: str | None) -> None:
        generator = torch.Generator().manual_seed(1)
        self.tensors = {
            name: torch.randn(shape, generator=generator).to(device)
            for name, (shape, _) in PARTS.items()
        }
        *decayed, norm = self.tensors.values()
        self.optimizer = build([{"params": decayed}, {"params": [norm], "weight_decay": 0.0}])
        if way is not None:
            parts = {
                id(tensor): (SteppedTensor(tensor, torch.nn.Parameter(tensor)), PARTS[name][1])
                for name, tensor in self.tensors.items()
            }
            self.groups = InnerGroups(self.optimizer, parts, decoupled_decay=False, way=way)
            self.groups.multipliers = MULTIPLIERS

    def step(self, seed: int, without: str = "") -> None:
        generator = torch.Generator().manual_seed(seed)
        for name, tensor in self.tensors.items():
            gradient = torch.randn(tensor.shape, generator=generator).to(tensor.device)
            tensor.grad = None if name == without else gradient * 10.0 ** -(seed % 4)
        self.optimizer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_one_step_is_the_optimizers_within_rounding(name: str, device: str) -> None:
    """Per element, from the same state: |dm| <= 4e(|m|+|g|), |dv| <= 4e v, |dp| <= 4e(|p|+|u|)."""
    model = Model(OPTIMIZERS[name], device, "fused")
    assert model.groups._fused_adam is not None
    for seed in range(4):
        before = copy.deepcopy({n: t.clone() for n, t in model.tensors.items()})
        states = {
            n: {k: v.clone() for k, v in model.optimizer.state[t].items() if k != "step"}
            for n, t in model.tensors.items()
        }
        model.step(seed)
        for n, tensor in model.tensors.items():
            group = model.optimizer.param_groups[1 if n == "norm" else 0]
            rate = torch.full((tensor.numel(),), group["lr"], dtype=torch.float64, device=device)
            for matrix, ranges in PARTS[n][1]:
                for first, last in ranges:
                    rate[first:last] *= MULTIPLIERS[matrix]
            rate = rate.view(tensor.shape)
            p, g = before[n].double(), tensor.grad.double()
            size = g.abs()
            zero = torch.zeros_like(p)
            m0 = states[n]["exp_avg"].double() if states[n] else zero
            v0 = states[n]["exp_avg_sq"].double() if states[n] else zero
            decoupled = "L2" not in name and name != "torch Adam"
            if not decoupled:
                # The two may cancel: rounding is that of the larger.
                g, size = g + group["weight_decay"] * p, size + group["weight_decay"] * p.abs()
            m, v = 0.9 * m0 + 0.1 * g, 0.95 * v0 + 0.05 * g * g
            s = seed + 1
            update = m / (1 - 0.9**s) / ((v / (1 - 0.95**s)).sqrt() + EPS)
            if decoupled:
                update = update + group["weight_decay"] * p
            expected = p - rate * update
            state = model.optimizer.state[tensor]
            bound = 4 * EPSILON
            assert ((state["exp_avg"] - m).abs() <= bound * (m0.abs() + size)).all()
            assert (
                (state["exp_avg_sq"] - v).abs() <= bound * (0.95 * v0 + 0.05 * size * size)
            ).all()
            moved = (rate * update).abs() + rate * group["weight_decay"] * p.abs()
            assert ((tensor - expected).abs() <= bound * (p.abs() + moved)).all()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_many_steps_are_those_of_param_groups(name: str, device: str) -> None:
    """Also without some gradients, and between steps of the optimizer's own."""
    fused, grouped = (Model(OPTIMIZERS[name], device, way) for way in ("fused", "grouped"))
    for seed in range(24):
        without = ("", "fc1", "", "norm")[seed % 4]
        for model in (fused, grouped):
            # Equal multipliers take the optimizer's own step, which counts by itself.
            native = seed % 6 == 5
            model.groups.multipliers = {} if native else MULTIPLIERS
            model.step(seed, without)
    for n in PARTS:
        torch.testing.assert_close(fused.tensors[n], grouped.tensors[n], rtol=3e-6, atol=3e-6)
        one, other = (m.optimizer.state[m.tensors[n]] for m in (fused, grouped))
        assert list(one) == list(other)
        for key, value in other.items():
            assert (one[key].dtype, one[key].shape) == (value.dtype, value.shape)
            if key == "step":
                assert float(one[key]) == float(value)
    for one, other in zip(
        fused.optimizer.param_groups, grouped.optimizer.param_groups, strict=True
    ):
        assert one.keys() == other.keys()
        assert one.get("step") == other.get("step")


def test_states_load_in_both_directions(device: str) -> None:
    build = OPTIMIZERS["torch AdamW"]
    fused, plain = Model(build, device, "fused"), Model(build, device, None)
    for seed in range(3):
        fused.step(seed)
    plain.optimizer.load_state_dict(copy.deepcopy(fused.optimizer.state_dict()))
    for name, tensor in plain.tensors.items():
        tensor.copy_(fused.tensors[name])
    plain.step(3)
    again = Model(build, device, "fused")
    again.optimizer.load_state_dict(copy.deepcopy(plain.optimizer.state_dict()))
    for name, tensor in again.tensors.items():
        tensor.copy_(plain.tensors[name])
    again.step(4)
    assert {float(again.optimizer.state[t]["step"]) for t in again.tensors.values()} == {5.0}


def test_a_step_counter_that_states_share_is_cloned(device: str) -> None:
    model = Model(OPTIMIZERS["torch AdamW"], device, "fused")
    model.step(0)
    shared = torch.tensor(5.0)
    for state in model.optimizer.state.values():
        state["step"] = shared
    model.groups._fused_adam.forget_counts()  # type: ignore[union-attr]
    model.step(1)
    assert [float(s["step"]) for s in model.optimizer.state.values()] == [6.0] * len(PARTS)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda groups: torch.optim.SGD(groups, lr=0.1), "not an Adam"),
        (torch_adam(torch.optim.AdamW, amsgrad=True), "its state is"),
        (torch_adam(torch.optim.AdamW, maximize=True), "its update is not Adam's"),
        (lambda groups: torch.optim.NAdam(groups, lr=0.1), "Adam"),
    ],
)
def test_what_is_not_adam_is_not_taken(build: Any, words: str, device: str) -> None:
    reason = recognize(build([torch.zeros(3, device=device)]))
    assert isinstance(reason, str)
    assert words in reason or "its state is" in reason
    model = Model(build, device, "auto")
    assert model.groups._fused_adam is None
    with pytest.raises(ValueError, match="--llr-step auto"):
        Model(build, device, "fused")


def test_kinds_are_recognized(device: str) -> None:
    kinds = {
        n: recognize(build([torch.zeros(3, device=device)])) for n, build in OPTIMIZERS.items()
    }
    assert all(isinstance(kind, AdamKind) for kind in kinds.values()), kinds
    assert [n for n, kind in kinds.items() if not kind.decoupled] == [  # type: ignore[union-attr]
        "torch Adam",
        "group counter, L2",
    ]
