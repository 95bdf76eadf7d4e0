"""The fused way of stepping: one launch for all tensors of an Adam optimizer, a rate per matrix.

The parameters, moments and step counters are the optimizer's own, under its own names, so a
checkpoint does not tell which way stepped it.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch

from megatron_llr.param_groups.probe import twin_of
from megatron_llr.param_groups.stepped_tensor import SteppedTensor
from megatron_llr.param_groups.views import Part

_MOMENTS = ("exp_avg", "exp_avg_sq")
_PROBE_SIZE = 32
# The candidates below differ by decay and its kind by 1e-4 of a weight and more, by rounding 2e-7.
_PROBE_TOLERANCE = 1e-6


@dataclass(frozen=True)
class AdamKind:
    """How an optimizer keeps its state and what it computes, as its own steps show.

    Attributes:
        decoupled: whether weight decay is AdamW's, rather than a part of the gradient (L2).
        counter: a step counter of a new tensor's state (torch); None where the group counts
            (`group["step"]`, apex and Transformer Engine).
        keys: names in the state of a tensor, in order.
        corrects_bias: whether moments are divided by their bias corrections.
    """

    decoupled: bool
    counter: torch.Tensor | None
    keys: tuple[str, ...]
    corrects_bias: bool = True


def _reference(
    start: torch.Tensor, gradients: Sequence[torch.Tensor], group: Mapping[str, Any], *, kind: str
) -> torch.Tensor:
    """Weights after Adam steps in fp64."""
    p, (beta1, beta2) = start.double(), group["betas"]
    m, v = torch.zeros_like(p), torch.zeros_like(p)
    rate, decay = group["lr"], group["weight_decay"]
    for step, gradient in enumerate(gradients, 1):
        g = gradient.double()
        if kind == "decoupled":
            p = p * (1 - rate * decay)
        else:
            g = g + decay * p
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
        p = p - rate / (1 - beta1**step) * m / ((v / (1 - beta2**step)).sqrt() + group["eps"])
    return p


def recognize(optimizer: Any) -> AdamKind | str:
    """Step a copy of an optimizer on a small tensor and compare with Adam's formula.

    Args:
        optimizer: any torch optimizer; it is not changed.

    Returns:
        What it computes, or one sentence on why the fused way cannot take its place.
    """
    base = optimizer.param_groups[0]
    if not {"lr", "betas", "eps", "weight_decay"} <= base.keys():
        return "it is not an Adam optimizer"
    if base.get("capturable") or base.get("differentiable"):
        return "it is built with capturable or differentiable"
    device = next(p.device for group in optimizer.param_groups for p in group["params"])
    generator = torch.Generator().manual_seed(0)
    start, *gradients = (torch.randn(_PROBE_SIZE, generator=generator) for _ in range(4))
    tensor = start.to(device, copy=True)
    group = {**base, "params": [tensor], "lr": 0.01, "weight_decay": 0.1}
    group.pop("step", None)
    twin = twin_of(optimizer)
    twin.param_groups = [group]
    try:
        for gradient in gradients:
            tensor.grad = gradient.to(device)
            twin.step()
    except Exception as error:
        return f"a step of it on one fp32 tensor failed ({type(error).__name__})"
    state = twin.state[tensor]
    counter = state.get("step")
    kept = {key for key, value in state.items() if value is not None} - {"step"}
    if kept != set(_MOMENTS) or any(
        state[key].dtype != torch.float32 or state[key].shape != tensor.shape for key in _MOMENTS
    ):
        return f"its state is {', '.join(sorted(kept)) or 'empty'}, not two fp32 moments"
    if not isinstance(counter, torch.Tensor) and not isinstance(group.get("step"), int):
        return "it keeps no step counter that can be read"
    for kind in ("decoupled", "l2"):
        expected = _reference(start, gradients, group, kind=kind)
        if (tensor.cpu().double() - expected).abs().max() <= _PROBE_TOLERANCE:
            fresh = None if counter is None else torch.zeros_like(counter)
            return AdamKind(kind == "decoupled", fresh, tuple(state))
    return "its update is not Adam's"


def reason_against(optimizer: Any, tensors: Sequence[torch.Tensor]) -> str | None:
    """One sentence on why the fused way cannot step these tensors, or None if it can."""
    if find_spec("triton") is None:
        return "triton is not installed"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if any(tensor.device.type != "cuda" for tensor in tensors) and not interpreted:
        return "its tensors are not on a CUDA device"
    if any(tensor.dtype != torch.float32 for tensor in tensors):
        return "it steps tensors that are not fp32"
    if any(not tensor.is_contiguous() for tensor in tensors):
        return "it steps tensors that are not contiguous"
    if any(isinstance(group["lr"], torch.Tensor) for group in optimizer.param_groups):
        return "its learning rate is a tensor"
    if len({(tuple(g.get("betas", ())), g.get("eps")) for g in optimizer.param_groups}) > 1:
        return "its param groups have different betas or eps"
    return None


class FusedAdamStep:
    """Steps all tensors of one optimizer in one launch.

    Tables of chunks are built once, and again when tensors, matrices or their memory change. A step
    uploads addresses of gradients that moved and the tables of rates and bias corrections; it does
    not wait for the device.

    Args:
        optimizer: the inner optimizer.
        parts: id of a stepped tensor -> the tensor and the matrices in it.
        kind: as `recognize` gives it.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        parts: Mapping[int, tuple[SteppedTensor, tuple[Part, ...]]],
        kind: AdamKind,
    ) -> None:
        self.optimizer = optimizer
        self._parts = parts
        self._kind = kind
        self._tensors: list[torch.Tensor] = []
        self._states: list[dict[str, Any]] = []
        self._memory: list[int] = []
        self._gradients: list[int] = []
        self._factors: tuple[torch.Tensor, torch.Tensor] | None = None
        self._counts: torch.Tensor | None = None
        optimizer.register_load_state_dict_post_hook(lambda _: self.forget_counts())

    def forget_counts(self) -> None:
        """Read the step counters again before the next step: another way of stepping ran."""
        self._counts = None

    @torch.no_grad()
    def step(
        self, multipliers: Mapping[str, float], factors_of: Any, *, multipliers_moved: bool
    ) -> bool:
        """Step every tensor that has a gradient.

        Args:
            multipliers: matrix id -> multiplier; 1 where not named.
            factors_of: multiplier -> factors on the learning rate and the weight decay.
            multipliers_moved: whether `multipliers` differs from the last step's.

        Returns:
            False, with nothing changed, if a gradient is not fp32 and contiguous.
        """
        groups = self.optimizer.param_groups
        tensors = [tensor for group in groups for tensor in group["params"]]
        gradients = [tensor.grad for tensor in tensors]
        if any(
            g is not None and (g.dtype != torch.float32 or not g.is_contiguous()) for g in gradients
        ):
            return False
        states = self._states_of(tensors, gradients)
        self._build_if_changed(tensors, states)
        addresses = [0 if g is None else g.data_ptr() for g in gradients]
        if addresses != self._gradients:
            self._gradients = addresses
            self._addresses[3].copy_(self._pinned(torch.tensor(addresses)), non_blocking=True)
        if self._factors is None or multipliers_moved:
            pairs = [factors_of(multipliers.get(m, 1.0) if m else 1.0) for m in self._row_matrix]
            table = torch.tensor(pairs, dtype=torch.float64).view(-1, 2)
            self._factors = table[:, 0], table[:, 1]
        self._count(groups, gradients)
        self._launch(groups)
        return True

    def _states_of(
        self, tensors: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor | None]
    ) -> list[dict[str, Any]]:
        """The state of every tensor; one with its first gradient gets what its optimizer makes."""
        known = self.optimizer.state
        states = [known.get(tensor) or {} for tensor in tensors]
        for number, (state, gradient) in enumerate(zip(states, gradients, strict=True)):
            if not state and gradient is not None:
                states[number] = known[tensors[number]] = self._new_state(tensors[number])
        return states

    def _new_state(self, tensor: torch.Tensor) -> dict[str, Any]:
        made: dict[str, Any] = {}
        for key in self._kind.keys:
            if key == "step":
                assert self._kind.counter is not None
                made[key] = self._kind.counter.clone()
            else:
                made[key] = torch.zeros_like(tensor) if key in _MOMENTS else None
        return made

    def _build_if_changed(
        self, tensors: Sequence[torch.Tensor], states: Sequence[dict[str, Any]]
    ) -> None:
        memory = [tensor.data_ptr() for tensor in tensors]
        for key in _MOMENTS:
            memory += [state[key].data_ptr() if state else 0 for state in states]
        if memory == self._memory and len(tensors) == len(self._tensors):
            return
        self._tensors, self._states = list(tensors), list(states)
        self._memory, self._gradients = memory, []
        self._factors = self._counts = None
        device = tensors[0].device
        self._group_of_tensor = torch.tensor(
            [i for i, group in enumerate(self.optimizer.param_groups) for _ in group["params"]]
        )
        rows: dict[tuple[int, str], int] = {}
        chunks: list[tuple[int, int, int, int]] = []
        from megatron_llr.param_groups.adam_kernel import CHUNK

        for number, tensor in enumerate(tensors):
            group = int(self._group_of_tensor[number])
            _, parts = self._parts.get(id(tensor), (None, ()))
            for matrix, ranges in _covering(parts, tensor.numel()):
                row = rows.setdefault((group, matrix), len(rows))
                for first, last in ranges:
                    chunks += [
                        (number, start, min(CHUNK, last - start), row)
                        for start in range(first, last, CHUNK)
                    ]
        self._row_group = torch.tensor([group for group, _ in rows])
        self._row_matrix = [matrix for _, matrix in rows]
        columns = torch.tensor(chunks, dtype=torch.int64).view(-1, 4).unbind(1)
        kinds = (torch.int32, torch.int64, torch.int32, torch.int32)
        self._chunks = tuple(
            column.to(kind).contiguous().to(device)
            for column, kind in zip(columns, kinds, strict=True)
        )
        addresses = torch.tensor([*memory, *[0] * len(tensors)]).view(4, -1)
        self._addresses = addresses.to(device)
        numbers = torch.empty(2 * (len(tensors) + len(rows)), device=device)
        self._numbers = numbers
        self._corrections = numbers[: 2 * len(tensors)].view(2, -1)
        self._rates = numbers[2 * len(tensors) :].view(2, -1)

    def _count(
        self, groups: Sequence[dict[str, Any]], gradients: Sequence[torch.Tensor | None]
    ) -> None:
        """Advance the step counters as the optimizer does, and keep copies on the host."""
        if self._kind.counter is None:
            # apex and Transformer Engine: a group counts, whether its tensors have gradients.
            counts = []
            for group in groups:
                if group["params"]:
                    group["step"] = int(group.get("step", 0)) + 1
                counts.append(int(group.get("step", 0)))
            self._counts = torch.tensor(counts)[self._group_of_tensor]
            return
        self._own_counters()
        with_gradient = [g is not None for g in gradients]
        counters = [
            state["step"]
            for state, counted in zip(self._states, with_gradient, strict=True)
            if counted
        ]
        if counters:
            torch._foreach_add_(counters, 1)
        assert self._counts is not None
        self._counts += torch.tensor(with_gradient)

    def _own_counters(self) -> None:
        """Read the counters once; one that several states share is cloned for each."""
        if self._counts is not None:
            return
        seen, values = set[int](), []
        for own in self._states:
            counter = own.get("step")
            if counter is None:
                values.append(0)
                continue
            if counter.data_ptr() in seen:
                counter = own["step"] = counter.clone()
            seen.add(counter.data_ptr())
            values.append(int(counter))
        self._counts = torch.tensor(values)

    def _launch(self, groups: Sequence[Mapping[str, Any]]) -> None:
        from megatron_llr.param_groups import adam_kernel

        assert self._factors is not None
        assert self._counts is not None
        settings = next(group for group in groups if group["params"])
        betas, torch_order = settings["betas"], self._kind.counter is not None
        on_rate, on_decay = self._factors
        rate = torch.tensor([float(group["lr"]) for group in groups], dtype=torch.float64)
        decay = torch.tensor(
            [float(group["weight_decay"]) for group in groups], dtype=torch.float64
        )
        rates = [rate[self._row_group] * on_rate, decay[self._row_group] * on_decay]
        steps = self._counts.double()
        first, second = (1 - beta**steps for beta in betas)
        if settings.get("bias_correction") in (False, 0):
            first, second = torch.ones_like(steps), torch.ones_like(steps)
        corrections = [first, second.sqrt() if torch_order else second]
        numbers = torch.cat([*corrections, *rates]).float()
        self._numbers.copy_(self._pinned(numbers), non_blocking=True)
        adam_kernel.launch(
            self._addresses,
            self._corrections,
            self._rates,
            self._chunks,  # type: ignore[arg-type]
            betas=(float(betas[0]), float(betas[1])),
            eps=float(settings["eps"]),
            decoupled=self._kind.decoupled,
            torch_order=torch_order,
        )

    def _pinned(self, table: torch.Tensor) -> torch.Tensor:
        # Torch keeps pinned memory until copies from it are done.
        return table.pin_memory() if self._addresses.is_cuda else table


def _covering(parts: tuple[Part, ...], numel: int) -> list[Part]:
    """The parts, and what none of them covers under the name "": multiplier 1."""
    if len(parts) < 2:
        # Rows that pad a vocabulary step with its matrix.
        return [(parts[0][0] if parts else "", ((0, numel),))]
    gaps, position = [], 0
    for first, last in sorted(run for _, ranges in parts for run in ranges):
        if first > position:
            gaps.append((position, first))
        position = max(position, last)
    if position < numel:
        gaps.append((position, numel))
    return [*parts, ("", tuple(gaps))] if gaps else list(parts)
