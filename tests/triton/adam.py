"""Shared by tests of the fused step: optimizers, a small model, and the formula in fp64."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from megatron_llr.param_groups.inner_groups import InnerGroups
from megatron_llr.param_groups.stepped_tensor import MatrixRanges, SteppedTensor

EPSILON = 2.0**-23
BETAS, EPS, RATE, DECAY = (0.9, 0.95), 1e-8, 0.01, 0.1
SETTINGS = {"lr": RATE, "betas": BETAS, "eps": EPS, "weight_decay": DECAY}
# Name -> shape and matrices: interleaved with runs that begin inside a row, stacked with more than
# one chunk, one matrix, a flat slice, no matrix.
TENSORS: dict[str, tuple[tuple[int, ...], tuple[MatrixRanges, ...]]] = {
    "qkv": (
        (24, 50),
        (
            ("q", ((0, 310), (600, 900))),
            ("k", ((310, 425), (900, 1025))),
            ("v", ((425, 600), (1025, 1200))),
        ),
    ),
    "fc1": ((60, 50), (("gate", ((0, 2500),)), ("up", ((2500, 3000),)))),
    "down": ((40, 30), (("down", ((0, 1200),)),)),
    "slice": ((777,), (("a", ((0, 100),)), ("b", ((100, 777),)))),
    "norm": ((70,), ()),
}
MULTIPLIERS = {
    "q": 1.5,
    "k": 5.0,
    "v": 0.25,
    "gate": 2.0,
    "up": 3.0,
    "down": 0.5,
    "a": 1.0,
    "b": 4.0,
}


class GroupCounter(torch.optim.Optimizer):
    """apex's and Transformer Engine's FusedAdam: their order of operations, states and counters.

    Args:
        params: tensors or param groups.
        decoupled: AdamW; else L2 decay.
        masters: fp32 weights of bf16 tensors in the state, gradients in `decoupled_grad`, and a
            state for tensors without gradient, as Transformer Engine with `master_weights=True`.
    """

    def __init__(self, params: Any, *, decoupled: bool = True, masters: bool = False) -> None:
        super().__init__(params, {**SETTINGS, "bias_correction": True})
        self.decoupled, self.masters = decoupled, masters
        self.use_decoupled_grad = masters

    def load_state_dict(self, state_dict: Any) -> None:
        super().load_state_dict(state_dict)
        tensors = [tensor for group in self.param_groups for tensor in group["params"]]
        for number, saved in state_dict["state"].items():
            # States keep their dtype, as Transformer Engine's do; torch casts them to the tensor's.
            self.state[tensors[number]] = {key: value.clone() for key, value in saved.items()}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            if group["params"]:
                group["step"] = group.get("step", 0) + 1
            for tensor in group["params"]:
                gradient = getattr(tensor, "decoupled_grad" if self.masters else "grad", None)
                if (self.masters or gradient is not None) and not self.state[tensor]:
                    self._create_state(tensor)
                if gradient is not None:
                    self._update(tensor, gradient.float(), group)

    def _create_state(self, tensor: torch.Tensor) -> None:
        for key in ("exp_avg", "exp_avg_sq"):
            self.state[tensor][key] = torch.zeros_like(tensor, dtype=torch.float32)
        if self.masters and tensor.dtype != torch.float32:
            self.state[tensor]["master_param"] = tensor.detach().clone().float()

    def _update(self, tensor: torch.Tensor, g: torch.Tensor, group: Any) -> None:
        state, (beta1, beta2), step = self.state[tensor], group["betas"], group["step"]
        p = state.get("master_param", tensor)
        if not self.decoupled:
            g = g + group["weight_decay"] * p
        m = state["exp_avg"].mul_(beta1).add_(g, alpha=1 - beta1)
        v = state["exp_avg_sq"].mul_(beta2).add_(g * g, alpha=1 - beta2)
        update = (m / (1 - beta1**step)) / ((v / (1 - beta2**step)).sqrt() + group["eps"])
        if self.decoupled:
            update = update + group["weight_decay"] * p
        p.sub_(update, alpha=group["lr"])
        if p is not tensor:
            tensor.copy_(p)


Build = Callable[[Any], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Build] = {
    "torch AdamW": lambda groups: torch.optim.AdamW(groups, **SETTINGS),
    "torch AdamW, for loop": lambda groups: torch.optim.AdamW(groups, foreach=False, **SETTINGS),
    "torch AdamW, fused": lambda groups: torch.optim.AdamW(groups, fused=True, **SETTINGS),
    "torch Adam, L2": lambda groups: torch.optim.Adam(groups, **SETTINGS),
    "group counter": GroupCounter,
    "group counter, L2": lambda groups: GroupCounter(groups, decoupled=False),
    "masters": lambda groups: GroupCounter(groups, masters=True),
}


class Model:
    """The tensors of `TENSORS` in two param groups (the norm without decay) of an optimizer.

    Args:
        name: of `OPTIMIZERS`.
        device: cuda or cpu.
        step: `--llr-step`; None without layer groups.
        decoupled_decay: of the layer groups.
    """

    def __init__(
        self, name: str, device: str, step: str | None, *, decoupled_decay: bool = False
    ) -> None:
        generator = torch.Generator().manual_seed(1)
        self.masters = name == "masters"
        self.tensors: dict[str, torch.Tensor] = {}
        for tensor, (shape, _) in TENSORS.items():
            half = self.masters and tensor != "norm"
            drawn = torch.randn(shape, generator=generator)
            self.tensors[tensor] = drawn.to(device, torch.bfloat16 if half else torch.float32)
        *decayed, norm = self.tensors.values()
        groups = [{"params": decayed}, {"params": [norm], "weight_decay": 0.0}]
        self.optimizer = OPTIMIZERS[name](groups)
        self.groups: InnerGroups | None = None
        if step is not None:
            parts = {
                id(tensor): (SteppedTensor(tensor, torch.nn.Parameter(tensor)), TENSORS[name][1])
                for name, tensor in self.tensors.items()
            }
            self.groups = InnerGroups(
                self.optimizer, parts, decoupled_decay=decoupled_decay, step=step
            )
            self.groups.multipliers = MULTIPLIERS

    def set_gradients(self, seed: int, without: Sequence[str] = (), *, bf16: bool = False) -> None:
        """Random gradients of changing size; of bf16 ones, those of the norm remain fp32."""
        generator = torch.Generator().manual_seed(seed)
        for name, tensor in self.tensors.items():
            drawn = torch.randn(tensor.shape, generator=generator) * 10.0 ** -(seed % 4)
            dtype = torch.bfloat16 if bf16 and name != "norm" else torch.float32
            gradient = None if name in without else drawn.to(tensor.device, dtype)
            setattr(tensor, "decoupled_grad" if self.masters else "grad", gradient)

    def gradient(self, name: str) -> torch.Tensor | None:
        """Of one tensor, under the name that the optimizer reads."""
        gradient: torch.Tensor | None = getattr(
            self.tensors[name], "decoupled_grad" if self.masters else "grad"
        )
        return gradient

    def weights(self, name: str) -> torch.Tensor:
        """The fp32 weights of one tensor: itself, or those in its state."""
        tensor = self.tensors[name]
        state = self.optimizer.state.get(tensor) or {}
        return state["master_param"] if "master_param" in state else tensor.float()

    def snapshot(self) -> dict[str, dict[str, torch.Tensor]]:
        """fp64 copies of weights and moments, and the step, of every tensor."""
        copies = {}
        for number, (name, tensor) in enumerate(self.tensors.items()):
            state = self.optimizer.state.get(tensor) or {}
            group = self.optimizer.param_groups[number == len(self.tensors) - 1]
            zero = torch.zeros_like(tensor, dtype=torch.float64)
            copies[name] = {
                "p": self.weights(name).detach().double().clone(),
                "m": state["exp_avg"].double() if "exp_avg" in state else zero,
                "v": state["exp_avg_sq"].double() if "exp_avg_sq" in state else zero,
                "step": torch.as_tensor(float(state.get("step", group.get("step", 0)))),
            }
        return copies


def rates_of(name: str, device: str, multipliers: Mapping[str, float]) -> torch.Tensor:
    """Learning rate of every element of a tensor, fp64."""
    shape, parts = TENSORS[name]
    rates = torch.full(shape, RATE, dtype=torch.float64, device=device)
    flat = rates.view(-1)
    for matrix, ranges in parts:
        if len(parts) == 1:
            flat *= multipliers.get(matrix, 1.0)
        else:
            for first, last in ranges:
                flat[first:last] *= multipliers.get(matrix, 1.0)
    return rates


def assert_within_rounding(
    before: Mapping[str, torch.Tensor],
    after: Mapping[str, torch.Tensor],
    gradient: torch.Tensor,
    rates: torch.Tensor,
    *,
    decay: torch.Tensor,
    decoupled: bool,
) -> None:
    """One step against the formula in fp64, every element within 4 eps of the terms of its sum.

    |dm| <= 4 eps (|m| + |g|), |dv| <= 4 eps v, |dp| <= 4 eps (|p| + |update|). Where m and g cancel
    the update is small but its error is not: there |update| is that of beta1 |m| + (1 - beta1) |g|.
    L2 decay adds to the gradient; its error counts as |g| + decay |p|.
    """
    (beta1, beta2), p, step = BETAS, before["p"], float(after["step"])
    g, size = gradient.double(), gradient.double().abs()
    if not decoupled:
        g, size = g + decay * p, size + decay * p.abs()
    m = beta1 * before["m"] + (1 - beta1) * g
    v = beta2 * before["v"] + (1 - beta2) * g * g
    root = (v / (1 - beta2**step)).sqrt() + EPS
    shrink = rates * decay * p if decoupled else torch.zeros_like(p)
    expected = p - shrink - rates * (m / (1 - beta1**step)) / root
    terms = (beta1 * before["m"].abs() + (1 - beta1) * size) / (1 - beta1**step)
    update = rates * terms / root + shrink.abs()
    bound = 4 * EPSILON
    assert ((after["m"] - m).abs() <= bound * (before["m"].abs() + size)).all()
    # Of (g + decay p) squared, which may cancel too.
    squares = beta2 * before["v"] + (1 - beta2) * size * size
    assert ((after["v"] - v).abs() <= bound * (v if decoupled else squares)).all()
    if not decoupled:
        # A sum that cancels carries its absolute error into the root.
        return_bound = bound * (p.abs() + update * (1 + squares / v.clamp(min=1e-30)))
        assert ((after["p"] - expected).abs() <= return_bound).all()
    else:
        assert ((after["p"] - expected).abs() <= bound * (p.abs() + update)).all()
