"""Ask an optimizer what it can do, instead of knowing it by name."""

from collections import OrderedDict, defaultdict
from typing import Any

import torch

# Small, with a cut inside a row: what a whole-matrix update cannot hide.
_SHAPE, _CUT = (4, 6), 9


def takes_views(optimizer: Any) -> bool:
    """Whether stepping a matrix in pieces gives bitwise what stepping it whole gives.

    True for element-wise updates (Adam, SGD), false for updates of whole matrices (Muon, Shampoo)
    and for optimizers that cannot step a slice. A twin of the optimizer takes two steps on a small
    random matrix; the optimizer itself, its groups and its state are not touched.
    """
    sample = next((p for group in optimizer.param_groups for p in group["params"]), None)
    if sample is None:
        return True
    generator = torch.Generator().manual_seed(0)
    start, *gradients = (
        torch.randn(_SHAPE, generator=generator).to(sample.device, sample.dtype) for _ in range(3)
    )
    whole, pieces = start.clone(), start.clone()
    flat = pieces.view(-1)
    try:
        _steps(optimizer, [whole], [[gradient] for gradient in gradients])
        _steps(
            optimizer,
            [flat[:_CUT], flat[_CUT:]],
            [[g.view(-1)[:_CUT], g.view(-1)[_CUT:]] for g in gradients],
        )
    except Exception:  # whatever it is that it cannot do, it cannot take views
        return False
    return torch.equal(whole, pieces)


def _steps(optimizer: Any, params: list[torch.Tensor], gradients: list[list[torch.Tensor]]) -> None:
    twin = object.__new__(type(optimizer))
    twin.__dict__.update(
        {
            name: value.copy() if isinstance(value, dict) else value
            for name, value in vars(optimizer).items()
        }
    )
    twin.__dict__.pop("step", None)
    twin._optimizer_step_pre_hooks = OrderedDict()
    twin._optimizer_step_post_hooks = OrderedDict()
    twin.state = defaultdict(dict)
    group = {**optimizer.param_groups[0], "params": params, "lr": 0.01}
    group.pop("step", None)
    twin.param_groups = [group]
    for step in gradients:
        for param, gradient in zip(params, step, strict=True):
            param.grad = gradient
            param.decoupled_grad = gradient  # type: ignore[attr-defined]
        twin.step()
