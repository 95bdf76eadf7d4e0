"""The computation and the state of an Adam optimizer, determined by steps of a copy of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_llr.param_groups.gradients import gradient_name
from megatron_llr.param_groups.probe import twin_of

MOMENTS = ("exp_avg", "exp_avg_sq")
MASTER = "master_param"
"""Name of the fp32 weights of a bf16 parameter in the precision-aware optimizer's state."""
_COUNTER = "step"

_PROBE_ELEMENTS = 32
_RATE, _DECAY = 0.01, 0.1
# Largest difference from the fp64 result. Decay, its kind and the bias corrections change a weight
# by 1e-4 and more.
_TOLERANCE = 1e-6
_REQUIRED_SETTINGS = frozenset({"lr", "betas", "eps", "weight_decay"})
_UNSUPPORTED_SETTINGS = ("amsgrad", "maximize", "capturable", "differentiable")


@dataclass(frozen=True)
class AdamLayout:
    """The computation and the state of an optimizer for tensors of one dtype.

    Attributes:
        decoupled: weight decay as in AdamW. Otherwise it is added to the gradient (L2).
        gradient: attribute that holds the gradient of a tensor, the result of `gradient_name`.
        keys: names in the state of a tensor, in order; their values may be None.
        counter: initial step counter of a tensor, 0 (torch); None if the param group counts
            (`group["step"]`, apex and Transformer Engine).
        has_master: bf16 tensors whose fp32 weights are in the state.
        without_gradient: names in the state of a tensor that never had a gradient; None if it has
            no state.
    """

    decoupled: bool
    gradient: str
    keys: tuple[str, ...]
    counter: torch.Tensor | None
    has_master: bool
    without_gradient: tuple[str, ...] | None

    def new_state(self, tensor: torch.Tensor, keys: Sequence[str]) -> dict[str, Any]:
        """The state that the optimizer's own step would create, before the update."""
        state: dict[str, Any] = {}
        for key in keys:
            if key in MOMENTS:
                state[key] = torch.zeros_like(tensor, dtype=torch.float32)
            elif key == MASTER:
                state[key] = tensor.detach().clone().float()
            elif key == _COUNTER and self.counter is not None:
                state[key] = self.counter.clone()
            else:
                state[key] = None
        return state


def layout_of(optimizer: Any, dtype: torch.dtype, device: torch.device) -> AdamLayout | str:
    """Step a copy of an optimizer on small tensors and compare with Adam's formula in fp64.

    Args:
        optimizer: any torch optimizer; neither it nor its state is changed.
        dtype: of the tensors that it steps.
        device: of those tensors.

    Returns:
        The layout, or one sentence on why a fused Adam step cannot replace the optimizer's.
    """
    base = next((g for g in optimizer.param_groups if g["params"]), optimizer.param_groups[0])
    if not base.keys() >= _REQUIRED_SETTINGS:
        return "it is not an Adam optimizer"
    for name in _UNSUPPORTED_SETTINGS:
        if any(group.get(name) for group in optimizer.param_groups):
            return f"it is built with {name}=True"
    name = gradient_name(optimizer)
    generator = torch.Generator().manual_seed(0)
    start, *gradients = (torch.randn(_PROBE_ELEMENTS, generator=generator) for _ in range(4))
    stepped, idle = (start.to(device, dtype, copy=True) for _ in range(2))
    start = stepped.cpu().float().clone()
    group = {**base, "params": [stepped, idle], "lr": _RATE, "weight_decay": _DECAY}
    group.pop(_COUNTER, None)
    twin = twin_of(optimizer)
    twin.param_groups = [group]
    # torch rejects an fp32 `grad` of a bf16 tensor.
    gradient_dtype = dtype if name == "grad" else torch.float32
    gradients = [gradient.to(device, gradient_dtype) for gradient in gradients]
    try:
        for gradient in gradients:
            setattr(stepped, name, gradient)
            twin.step()
    except Exception as error:
        return f"a step of a copy of it failed with {type(error).__name__}"
    state = twin.state.get(stepped, {})
    reason = _unsupported_state(state, group, stepped)
    if reason is not None:
        return reason
    has_master = dtype != torch.float32
    result = state[MASTER] if has_master else stepped
    for decoupled in (True, False):
        expected = _reference_weights(start, gradients, group, decoupled=decoupled)
        if (result.cpu().double() - expected).abs().max() > _TOLERANCE:
            continue
        if has_master and not torch.equal(stepped, result.to(dtype)):
            return "its bf16 weights are not its fp32 weights rounded"
        if not has_master and MASTER in state and not torch.equal(state[MASTER].cpu(), start):
            return "its state has separate fp32 weights of fp32 tensors"
        counter = state.get(_COUNTER)
        return AdamLayout(
            decoupled=decoupled,
            gradient=name,
            keys=tuple(state),
            counter=None if counter is None else torch.zeros_like(counter),
            has_master=has_master,
            without_gradient=tuple(twin.state[idle]) if idle in twin.state else None,
        )
    return "its update is not that of Adam"


def _unsupported_state(
    state: Mapping[str, Any], group: Mapping[str, Any], tensor: torch.Tensor
) -> str | None:
    """Why the fused step does not support a state, or None if it does."""
    kept = {key for key, value in state.items() if value is not None} - {_COUNTER}
    if not {*MOMENTS} <= kept <= {*MOMENTS, MASTER}:
        return f"its state is {', '.join(sorted(kept)) or 'empty'}, not exp_avg and exp_avg_sq"
    for key in sorted(kept):
        value = state[key]
        if value.dtype != torch.float32 or value.shape != tensor.shape:
            return f"its {key} is {value.dtype}, not torch.float32"
    if tensor.dtype != torch.float32 and MASTER not in kept:
        return f"it steps {tensor.dtype} tensors without fp32 weights"
    counter = state.get(_COUNTER)
    counts = isinstance(group.get(_COUNTER), int)
    if isinstance(counter, torch.Tensor) == counts or (counter is not None and counts):
        return "it has no step counter per tensor or per param group"
    return None


def _reference_weights(
    start: torch.Tensor,
    gradients: Sequence[torch.Tensor],
    group: Mapping[str, Any],
    *,
    decoupled: bool,
) -> torch.Tensor:
    """Weights after Adam steps with these gradients, in fp64."""
    p, (beta1, beta2) = start.double(), group["betas"]
    m, v = torch.zeros_like(p), torch.zeros_like(p)
    for step, gradient in enumerate(gradients, 1):
        g = gradient.cpu().double()
        if decoupled:
            p = p * (1 - _RATE * _DECAY)
        else:
            g = g + _DECAY * p
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
        corrections = 1 - beta1**step, 1 - beta2**step
        if not group.get("bias_correction", True):
            corrections = 1.0, 1.0
        p = p - _RATE * (m / corrections[0]) / ((v / corrections[1]).sqrt() + group["eps"])
    return p
