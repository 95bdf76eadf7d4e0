"""Ask an optimizer what it can do, instead of knowing it by name."""

from collections import OrderedDict, defaultdict
from typing import Any, Literal

import torch

from megatron_llr.param_groups.views import FusedTensor, Part

Stepping = Literal["strided", "contiguous", "whole"]

# Two matrices interleaved row by row, and two of which one begins inside a row: what an update of
# the whole cannot hide, and what a kernel that takes strides for contiguous memory gets wrong.
_SHAPE = (4, 6)
_INTERLEAVED: tuple[Part, ...] = (("a", ((0, 6), (12, 18))), ("b", ((6, 12), (18, 24))))
_CUT: tuple[Part, ...] = (("a", ((0, 9),)), ("b", ((9, 24),)))


def stepping(optimizer: Any) -> Stepping:
    """In what pieces an optimizer can step a matrix with, to the bit, the result of the whole.

    `strided` and `contiguous` for element-wise updates (Adam, SGD), as kernels take views with a
    stride or do not; `whole` for updates of whole matrices (Muon, SOAP), and for optimizers that
    cannot step a slice of a tensor whose state they have made (states with one scale per tensor). A
    twin of the optimizer takes one step on a small random matrix and two in pieces; the optimizer
    itself, its groups and its state are not touched.
    """
    sample = next((p for group in optimizer.param_groups for p in group["params"]), None)
    if sample is None:
        return "strided"
    generator = torch.Generator().manual_seed(0)
    start, *gradients = (
        torch.randn(_SHAPE, generator=generator).to(sample.device, sample.dtype) for _ in range(4)
    )
    whole = _stepped(optimizer, start, gradients, (), strided=False)
    answers: tuple[tuple[Stepping, tuple[Part, ...]], ...] = (
        ("strided", _INTERLEAVED),
        ("contiguous", _CUT),
    )
    for answer, parts in answers:
        stepped = _stepped(optimizer, start, gradients, parts, strided=answer == "strided")
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
    optimizer: Any,
    start: torch.Tensor,
    gradients: list[torch.Tensor],
    parts: tuple[Part, ...],
    *,
    strided: bool,
) -> torch.Tensor | None:
    """A copy of `start` after a step for every gradient, from the second in pieces; None if one
    fails.
    """
    twin = twin_of(optimizer)
    tensor = start.clone()
    group = {**optimizer.param_groups[0], "params": [tensor], "lr": 0.01}
    group.pop("step", None)
    twin.param_groups = [group]
    try:
        for number, gradient in enumerate(gradients):
            for name in ("grad", "decoupled_grad"):
                setattr(tensor, name, gradient)
            if parts and number:
                _step_in_pieces(twin, tensor, parts, strided=strided)
            else:
                twin.step()
    except Exception:  # whatever it is that it cannot do, it cannot step these pieces
        return None
    return tensor


def twin_of(optimizer: Any) -> Any:
    """An optimizer of the same class and settings, without state, hooks and groups."""
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
    return twin


def _step_in_pieces(
    twin: Any, tensor: torch.Tensor, parts: tuple[Part, ...], *, strided: bool
) -> None:
    """One step as the layer groups make it: views of tensor, gradient and state."""
    fused = FusedTensor(tensor, parts, strided=strided)
    fused.slice_gradient()
    base, lent = twin.state, defaultdict[Any, dict[str, Any]](dict)
    fused.lend_state(base[tensor], lent)
    (group,) = twin.param_groups
    twin.state, group["params"] = lent, [view for views in fused.views.values() for view in views]
    twin.step()
    fused.return_state(base[tensor], lent)
    twin.state, group["params"] = base, [tensor]
