"""Ask an optimizer what it can do, instead of knowing it by name."""

from collections import OrderedDict, defaultdict
from collections.abc import Sequence
from typing import Any, Literal

import torch

from megatron_llr.param_groups.views import FusedTensor, Part

Stepping = Literal["strided", "contiguous", "whole"]

_COLUMNS = 6
# Rates of the param groups of a probe's later steps differ, so that one that is skipped, or stepped
# at the rate of another, shows.
_RATE = 0.01


def _interleaved(count: int) -> tuple[Part, ...]:
    """Matrices interleaved row by row, two rows each: what an update of the whole cannot hide, and
    what a kernel that takes views with strides for contiguous memory gets wrong.
    """
    return tuple(
        (
            str(part),
            tuple((row * _COLUMNS, (row + 1) * _COLUMNS) for row in (part, part + count)),
        )
        for part in range(count)
    )


def _consecutive(count: int) -> tuple[Part, ...]:
    """The first element by itself, then matrices that begin inside a row."""
    ends = [0, 1, *(2 * part * _COLUMNS + 3 for part in range(1, count - 1)), 2 * count * _COLUMNS]
    return tuple((str(part), ((ends[part], ends[part + 1]),)) for part in range(count))


def stepping(optimizer: Any) -> Stepping:
    """In what pieces an optimizer can step a matrix with, to the bit, the result of the whole.

    `strided` and `contiguous` for element-wise updates (Adam, SGD), as kernels take views with a
    stride or do not; `whole` for updates of whole matrices (Muon, SOAP), for optimizers that cannot
    step a slice of a tensor whose state they have made (states with one scale per tensor), and for
    those that step only as many param groups as they were constructed with (apex's FusedAdam). A
    copy of the optimizer takes one step on a small random matrix and two in pieces, each piece in a
    param group with its own learning rate; the optimizer itself, its groups and its state are not
    touched.
    """
    sample = next((p for group in optimizer.param_groups for p in group["params"]), None)
    if sample is None:
        return "strided"
    # More groups than the optimizer was constructed with.
    count = len(optimizer.param_groups) + 2
    generator = torch.Generator().manual_seed(0)
    start, *gradients = (
        torch.randn((2 * count, _COLUMNS), generator=generator).to(sample.device, sample.dtype)
        for _ in range(4)
    )
    rates = [_RATE * (1 + part) for part in range(count)]
    wholes = [_stepped(optimizer, start, gradients, (), [rate], strided=False) for rate in rates]
    answers: tuple[tuple[Stepping, tuple[Part, ...]], ...] = (
        ("strided", _interleaved(count)),
        ("contiguous", _consecutive(count)),
    )
    for answer, parts in answers:
        stepped = _stepped(optimizer, start, gradients, parts, rates, strided=answer == "strided")
        if stepped is not None and all(
            whole is not None
            and all(
                torch.equal(whole.view(-1)[first:last], stepped.view(-1)[first:last])
                for first, last in ranges
            )
            for whole, (_, ranges) in zip(wholes, parts, strict=True)
        ):
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
    rates: Sequence[float],
    *,
    strided: bool,
) -> torch.Tensor | None:
    """A copy of `start` after a step for every gradient; None if one fails.

    The first step takes the tensor whole, the others its parts at one of `rates` each; without
    parts, the tensor at the first of them.
    """
    twin = twin_of(optimizer)
    tensor = start.clone()
    group = {**optimizer.param_groups[0], "params": [tensor], "lr": _RATE}
    group.pop("step", None)
    twin.param_groups = [group]
    try:
        for number, gradient in enumerate(gradients):
            for name in ("grad", "decoupled_grad"):
                setattr(tensor, name, gradient)
            if parts and number:
                _step_in_pieces(twin, tensor, parts, rates, strided=strided)
            else:
                group["lr"] = rates[0] if number else _RATE
                twin.step()
    except Exception:  # any failure means that these views are not supported
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
    twin: Any,
    tensor: torch.Tensor,
    parts: tuple[Part, ...],
    rates: Sequence[float],
    *,
    strided: bool,
) -> None:
    """One step as the layer groups make it: views of tensor, gradient and state, in many groups."""
    fused = FusedTensor(tensor, parts, strided=strided)
    fused.slice_gradient()
    base, lent = twin.state, defaultdict[Any, dict[str, Any]](dict)
    fused.lend_state(base[tensor], lent)
    (group,) = twin.param_groups
    pieces = [
        {**group, "params": fused.views[matrix], "lr": rate}
        for (matrix, _), rate in zip(parts, rates, strict=True)
    ]
    twin.state, twin.param_groups = lent, pieces
    twin.step()
    fused.return_state(base[tensor], lent)
    group.update({key: value for key, value in pieces[0].items() if key not in ("params", "lr")})
    twin.state, twin.param_groups = base, [group]
