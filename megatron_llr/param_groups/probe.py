"""Ask an optimizer what it can do, instead of knowing it by name."""

from collections import OrderedDict, defaultdict
from typing import Any, Literal

import torch

from megatron_llr.param_groups.gradients import GRADIENTS
from megatron_llr.param_groups.views import FusedTensor, Part

Stepping = Literal["strided", "contiguous", "whole"]

_COLUMNS = 6
_RATES = (0.01, 0.03, 0.002)
# Kernels of apex and Transformer Engine take at most 110 tensors in a launch, torch's fewer.
_MANY = 120
# More groups than an optimizer has: one that pairs them with a list that it made when it was
# constructed steps no more than it had then.
_MORE_GROUPS = 4
# Weights around 1 move by their rate: a step left out or at another rate is 1000 times more.
_ROUNDING = 1e-6


def stepping(optimizer: Any) -> Stepping:
    """In what pieces an optimizer can step a matrix with the result of the whole.

    `strided` and `contiguous` for element-wise updates (Adam, SGD), as kernels take views with a
    stride or do not; `whole` for updates of whole matrices (Muon, SOAP), and for optimizers that
    cannot step a slice of a tensor whose state they have made (states with one scale per tensor),
    or param groups that they were not constructed with. A twin of the optimizer takes one step on a
    small random matrix in one group, and two in pieces, in many groups of different rates; the
    optimizer itself, its groups and its state are not touched.
    """
    sample = next((p for group in optimizer.param_groups for p in group["params"]), None)
    if sample is None:
        return "strided"
    answers: tuple[Stepping, ...] = ("strided", "contiguous")
    for answer in answers:
        # Few pieces first: what steps whole matrices is slow on many, and known by few.
        if all(_takes(optimizer, sample, many, strided=answer == "strided") for many in (0, _MANY)):
            return answer
    return "whole"


def _takes(optimizer: Any, sample: torch.Tensor, many: int, *, strided: bool) -> bool:
    parts = _pieces(len(optimizer.param_groups) + _MORE_GROUPS, many)
    rows = parts[-1][1][-1][1] // _COLUMNS
    start, *gradients = _random((rows, _COLUMNS), sample)
    rates = {matrix: _RATES[number % len(_RATES)] for number, (matrix, _) in enumerate(parts)}
    whole = _stepped_whole(optimizer, start, gradients, parts, rates)
    stepped = _stepped(optimizer, start, gradients, rates, parts=parts, strided=strided)
    return whole is not None and stepped is not None and _agree(whole, stepped)


def takes_new_groups(optimizer: Any) -> bool:
    """Whether an optimizer steps whole tensors right in param groups that it did not have before.

    apex's FusedAdam pairs its groups with a list of the length that they had at its construction,
    and leaves all further groups as they are, silently.
    """
    sample = next((p for group in optimizer.param_groups for p in group["params"]), None)
    if sample is None:
        return True
    count = len(optimizer.param_groups) + _MORE_GROUPS
    start, *gradients = _random((4, _COLUMNS), sample)
    rates = [_RATES[number % len(_RATES)] for number in range(count)]
    expected = {rate: _stepped(optimizer, start, gradients, {"": rate}) for rate in _RATES}
    twin = twin_of(optimizer)
    tensors = [start.clone() for _ in rates]
    base = _group(optimizer, tensors)
    twin.param_groups = [base]
    try:
        for number, gradient in enumerate(gradients):
            for tensor in tensors:
                _set_gradient(tensor, gradient)
            if number == 1:
                pairs = zip(tensors, rates, strict=True)
                twin.param_groups = [{**base, "params": [t], "lr": rate} for t, rate in pairs]
            twin.step()
    except Exception:  # whatever it is that it cannot do, it cannot step these groups
        return False
    results = [expected[rate] for rate in rates]
    return all(
        result is not None and _agree(tensor, result)
        for tensor, result in zip(tensors, results, strict=True)
    )


def _agree(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two results are equal, but for rounding where a kernel steps the ends of a tensor
    without its vector instructions.
    """
    if one.dtype not in (torch.float32, torch.float64):
        return torch.equal(one, other)
    return torch.allclose(one, other, rtol=0, atol=_ROUNDING)


def _pieces(count: int, many: int) -> tuple[Part, ...]:
    """`count` matrices and more that cover a matrix of `_COLUMNS` columns.

    Interleaved row by row, two of `many` runs, one of one element, and one that begins inside a
    row: what an update of the whole cannot hide, and what a kernel that takes strides for
    contiguous memory gets wrong.
    """
    interleaved, position = 2 * count, 0
    found: dict[str, list[tuple[int, int]]] = {}
    for row in range(interleaved + 2 * many):
        name = str(row % count) if row < interleaved else ("many", "others")[row % 2]
        found.setdefault(name, []).append((position, position + _COLUMNS))
        position += _COLUMNS
    found["element"] = [(position, position + 1)]
    found["cut"] = [(position + 1, position + 2 * _COLUMNS)]
    return tuple((name, tuple(ranges)) for name, ranges in found.items())


def _random(shape: tuple[int, int], like: torch.Tensor) -> list[torch.Tensor]:
    """A start and three gradients, on the device and of the dtype of `like`."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(like.device, like.dtype) for _ in range(4)]


def _group(optimizer: Any, tensors: list[torch.Tensor]) -> dict[str, Any]:
    group = {**optimizer.param_groups[0], "params": tensors, "lr": _RATES[0]}
    group.pop("step", None)
    return group


def _set_gradient(tensor: torch.Tensor, gradient: torch.Tensor) -> None:
    for name in GRADIENTS:
        setattr(tensor, name, gradient)


def _stepped_whole(
    optimizer: Any,
    start: torch.Tensor,
    gradients: list[torch.Tensor],
    parts: tuple[Part, ...],
    rates: dict[str, float],
) -> torch.Tensor | None:
    """What elementwise steps with a rate for every part give: steps of the whole at each rate."""
    at_rate = {rate: _stepped(optimizer, start, gradients, {"": rate}) for rate in _RATES}
    result = start.clone()
    for matrix, ranges in parts:
        stepped = at_rate[rates[matrix]]
        if stepped is None:
            return None
        for first, last in ranges:
            result.view(-1)[first:last] = stepped.view(-1)[first:last]
    return result


def _stepped(
    optimizer: Any,
    start: torch.Tensor,
    gradients: list[torch.Tensor],
    rates: dict[str, float],
    *,
    parts: tuple[Part, ...] = (),
    strided: bool = False,
) -> torch.Tensor | None:
    """A copy of `start` after a step for every gradient, from the second at the rates; None if one
    fails. In pieces if there are `parts`, else whole at the one rate.
    """
    twin = twin_of(optimizer)
    tensor = start.clone()
    group = _group(optimizer, [tensor])
    twin.param_groups = [group]
    try:
        for number, gradient in enumerate(gradients):
            _set_gradient(tensor, gradient)
            if parts and number:
                _step_in_pieces(twin, tensor, parts, rates, strided=strided)
                continue
            if number:
                (group["lr"],) = rates.values()
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
    twin: Any,
    tensor: torch.Tensor,
    parts: tuple[Part, ...],
    rates: dict[str, float],
    *,
    strided: bool,
) -> None:
    """One step as the layer groups make it: a group for every part, of views of the tensor, its
    gradient and its state.
    """
    fused = FusedTensor(tensor, parts, strided=strided)
    fused.slice_gradient()
    base, lent = twin.state, defaultdict[Any, dict[str, Any]](dict)
    fused.lend_state(base[tensor], lent)
    (group,) = twin.param_groups
    pieces = [
        {**group, "params": views, "lr": rates[matrix]} for matrix, views in fused.views.items()
    ]
    twin.state, twin.param_groups = lent, pieces
    twin.step()
    fused.return_state(base[tensor], lent)
    group.update({key: pieces[0][key] for key in pieces[0].keys() - {"params", "lr"}})
    twin.state, twin.param_groups = base, [group]
