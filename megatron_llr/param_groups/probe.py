"""Determines by test steps which tensors and param groups an optimizer can step."""

from collections import OrderedDict, defaultdict
from typing import Any, Literal

import torch

from megatron_llr.matrices.ids import MatrixId
from megatron_llr.param_groups.gradients import GRADIENTS
from megatron_llr.param_groups.stepped_tensor import MatrixRanges
from megatron_llr.param_groups.views import FusedTensor

Stepping = Literal["strided", "contiguous", "whole"]
"""The tensors that an optimizer can step: views with a stride, contiguous views, whole matrices."""

_COLUMNS = 6
_WHOLE = MatrixId("whole")
_RATES = (0.01, 0.03, 0.002)
# Kernels of apex and Transformer Engine support at most 110 tensors in a launch, torch's fewer.
_MANY = 120
# Number of additional groups. An optimizer that pairs its groups with a list that it created at
# construction steps only as many as it had then.
_MORE_GROUPS = 4
# Weights of about 1 change by the rate. A missing step or another rate gives an error that is 1000
# times larger.
_ROUNDING = 1e-6


def stepping(optimizer: Any) -> Stepping:
    """Which views of a matrix an optimizer can step, with the same result as the whole matrix.

    `strided` or `contiguous` for element-wise updates (Adam, SGD), depending on whether the kernels
    support views with a stride. `whole` for updates of whole matrices (Muon, SOAP), and for
    optimizers that cannot step a slice of a tensor with existing state (states with one scale per
    tensor), or param groups that they were not constructed with. A copy of the optimizer makes one
    step on a small random matrix in one group, and two on views of it in many groups of different
    rates. The optimizer, its groups and its state are not changed.
    """
    sample = next((p for group in optimizer.param_groups for p in group["params"]), None)
    if sample is None:
        return "strided"
    answers: tuple[Stepping, ...] = ("strided", "contiguous")
    for answer in answers:
        # Few views first: a step of whole matrices is slow on many views and fails on few.
        if all(
            _steps_views(optimizer, sample, many, strided=answer == "strided")
            for many in (0, _MANY)
        ):
            return answer
    return "whole"


def _steps_views(optimizer: Any, sample: torch.Tensor, many: int, *, strided: bool) -> bool:
    """Whether steps of views at several rates equal steps of the whole matrix at each rate."""
    parts = _probe_parts(len(optimizer.param_groups) + _MORE_GROUPS, many)
    rows = parts[-1][1][-1][1] // _COLUMNS
    start, *gradients = _random_tensors((rows, _COLUMNS), sample)
    rates = {matrix: _RATES[index % len(_RATES)] for index, (matrix, _) in enumerate(parts)}
    at_rate = {rate: _stepped(optimizer, start, gradients, {_WHOLE: rate}) for rate in _RATES}
    expected = start.clone()
    for matrix, ranges in parts:
        whole = at_rate[rates[matrix]]
        if whole is None:
            return False
        for first, last in ranges:
            expected.view(-1)[first:last] = whole.view(-1)[first:last]
    stepped = _stepped(optimizer, start, gradients, rates, parts=parts, strided=strided)
    return stepped is not None and _equal_within_rounding(expected, stepped)


def takes_new_groups(optimizer: Any) -> bool:
    """Whether an optimizer correctly steps whole tensors in param groups that were added later.

    apex's FusedAdam pairs its groups with a list that it created at construction, and silently does
    not step additional groups.
    """
    sample = next((p for group in optimizer.param_groups for p in group["params"]), None)
    if sample is None:
        return True
    count = len(optimizer.param_groups) + _MORE_GROUPS
    start, *gradients = _random_tensors((4, _COLUMNS), sample)
    rates = [_RATES[index % len(_RATES)] for index in range(count)]
    expected = {rate: _stepped(optimizer, start, gradients, {_WHOLE: rate}) for rate in _RATES}
    twin = twin_of(optimizer)
    tensors = [start.clone() for _ in rates]
    base = _probe_group(optimizer, tensors)
    twin.param_groups = [base]
    try:
        for index, gradient in enumerate(gradients):
            for tensor in tensors:
                _set_gradient(tensor, gradient)
            if index == 1:
                pairs = zip(tensors, rates, strict=True)
                twin.param_groups = [{**base, "params": [t], "lr": rate} for t, rate in pairs]
            twin.step()
    except Exception:  # any failure means that these groups are unsupported
        return False
    results = [expected[rate] for rate in rates]
    return all(
        result is not None and _equal_within_rounding(tensor, result)
        for tensor, result in zip(tensors, results, strict=True)
    )


def _equal_within_rounding(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two results are equal within rounding error.

    A kernel that steps the ends of a tensor without vector instructions may round differently.
    """
    if one.dtype not in (torch.float32, torch.float64):
        return torch.equal(one, other)
    return torch.allclose(one, other, rtol=0, atol=_ROUNDING)


def _probe_parts(count: int, many: int) -> tuple[MatrixRanges, ...]:
    """Ranges that cover a matrix of `_COLUMNS` columns.

    `count` matrices interleaved row by row, two of `many` runs, one of one element, and one that
    begins inside a row. An update of whole matrices, and a kernel that ignores strides, give other
    results on these than on the whole.
    """
    interleaved, position = 2 * count, 0
    ranges: dict[MatrixId, list[tuple[int, int]]] = {}
    for row in range(interleaved + 2 * many):
        name = f"row{row % count}" if row < interleaved else ("many", "others")[row % 2]
        ranges.setdefault(MatrixId(name), []).append((position, position + _COLUMNS))
        position += _COLUMNS
    ranges[MatrixId("element")] = [(position, position + 1)]
    ranges[MatrixId("inside_row")] = [(position + 1, position + 2 * _COLUMNS)]
    return tuple((name, tuple(runs)) for name, runs in ranges.items())


def _random_tensors(shape: tuple[int, int], like: torch.Tensor) -> list[torch.Tensor]:
    """Initial weights and three gradients, with the device and dtype of `like`."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(like.device, like.dtype) for _ in range(4)]


def _probe_group(optimizer: Any, tensors: list[torch.Tensor]) -> dict[str, Any]:
    """A param group with the settings of the optimizer's first."""
    group = {**optimizer.param_groups[0], "params": tensors, "lr": _RATES[0]}
    group.pop("step", None)
    return group


def _set_gradient(tensor: torch.Tensor, gradient: torch.Tensor) -> None:
    for name in GRADIENTS:
        setattr(tensor, name, gradient)


def _stepped(
    optimizer: Any,
    start: torch.Tensor,
    gradients: list[torch.Tensor],
    rates: dict[MatrixId, float],
    *,
    parts: tuple[MatrixRanges, ...] = (),
    strided: bool = False,
) -> torch.Tensor | None:
    """A copy of `start` after one step per gradient, from the second on at `rates`.

    Stepped as views if there are `parts`, otherwise whole at the only rate. None if a step fails.
    """
    twin = twin_of(optimizer)
    tensor = start.clone()
    group = _probe_group(optimizer, [tensor])
    twin.param_groups = [group]
    try:
        for index, gradient in enumerate(gradients):
            _set_gradient(tensor, gradient)
            if parts and index:
                _step_as_views(twin, tensor, parts, rates, strided=strided)
                continue
            if index:
                (group["lr"],) = rates.values()
            twin.step()
    except Exception:  # any failure means that these views are unsupported
        return None
    return tensor


def twin_of(optimizer: Any) -> Any:
    """A copy of an optimizer, with its class and settings but without state, hooks and groups."""
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


def _step_as_views(
    twin: Any,
    tensor: torch.Tensor,
    parts: tuple[MatrixRanges, ...],
    rates: dict[MatrixId, float],
    *,
    strided: bool,
) -> None:
    """One step with a group per matrix, of views of the tensor, its gradient and its state."""
    fused = FusedTensor(tensor, parts, strided=strided)
    fused.slice_gradient()
    base, lent = twin.state, defaultdict[Any, dict[str, Any]](dict)
    fused.lend_state(base[tensor], lent)
    (group,) = twin.param_groups
    layer_groups = [
        {**group, "params": views, "lr": rates[matrix]} for matrix, views in fused.views.items()
    ]
    twin.state, twin.param_groups = lent, layer_groups
    twin.step()
    fused.return_state(base[tensor], lent)
    group.update({key: layer_groups[0][key] for key in layer_groups[0].keys() - {"params", "lr"}})
    twin.state, twin.param_groups = base, [group]
