"""Ask an optimizer what it can do, instead of knowing it by name."""

from collections import OrderedDict, defaultdict
from typing import Any, Literal

import torch

Stepping = Literal["strided", "contiguous", "whole"]

# Small, with a cut inside a row: what a whole-matrix update cannot hide.
_SHAPE, _CUT = (4, 6), 9


def stepping(optimizer: Any) -> Stepping:
    """In what pieces an optimizer can step a matrix with, to the bit, the result of the whole.

    `strided` and `contiguous` for element-wise updates (Adam, SGD), as kernels take views with a
    stride or do not; `whole` for updates of whole matrices (Muon, Shampoo) and for optimizers that
    cannot step a slice. A twin of the optimizer takes two steps on a small random matrix; the
    optimizer itself, its groups and its state are not touched.
    """
    sample = next((p for group in optimizer.param_groups for p in group["params"]), None)
    if sample is None:
        return "strided"
    generator = torch.Generator().manual_seed(0)
    start, *gradients = (
        torch.randn(_SHAPE, generator=generator).to(sample.device, sample.dtype) for _ in range(3)
    )

    def contiguous(tensor: torch.Tensor) -> list[torch.Tensor]:
        flat = tensor.view(-1)
        return [flat[:_CUT], flat[_CUT:]]

    def strided(tensor: torch.Tensor) -> list[torch.Tensor]:
        # A kernel that took these for contiguous would stay inside the tensor, and be found out.
        return [tensor[0::2], tensor[1::2]]

    whole = _stepped(optimizer, start, gradients, lambda tensor: [tensor])
    answers: tuple[tuple[Stepping, Any], ...] = (("strided", strided), ("contiguous", contiguous))
    for answer, pieces in answers:
        stepped = _stepped(optimizer, start, gradients, pieces)
        if whole is not None and stepped is not None and torch.equal(whole, stepped):
            return answer
    return "whole"


def updates_apart(optimizer: Any, tensor: torch.Tensor) -> bool:
    """Whether an optimizer that steps whole matrices updates the parts of this one each by itself.

    True of Megatron's Muon for a fused query, key and value weight, unless `--muon-no-split-qkv`.
    The two methods are those of emerging-optimizers that `row_scaling` builds on.
    """
    splits = getattr(optimizer, "split_qkv", False) and optimizer.is_qkv_fn(tensor)
    return bool(splits) and all(
        callable(getattr(optimizer, method, None))
        for method in ("pre_weight_update_fn_inplace", "_apply_weight_decay_inplace")
    )


def _stepped(
    optimizer: Any, start: torch.Tensor, gradients: list[torch.Tensor], pieces: Any
) -> torch.Tensor | None:
    """A copy of `start` after a step for every gradient, in pieces; None if a step fails."""
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
    tensor = start.clone()
    params = pieces(tensor)
    group = {**optimizer.param_groups[0], "params": params, "lr": 0.01}
    group.pop("step", None)
    twin.param_groups = [group]
    try:
        for gradient in gradients:
            for param, part in zip(params, pieces(gradient), strict=True):
                param.grad = part
                param.decoupled_grad = part
            twin.step()
    except Exception:  # whatever it is that it cannot do, it cannot step these pieces
        return None
    return tensor
