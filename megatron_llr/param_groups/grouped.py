"""The grouped way of stepping: during a step the optimizer sees a param group per multiplier.

Serves every element-wise optimizer. Groups and state are the optimizer's own again when the step
ends, however it ends, so Megatron's checkpoints never see the layer groups. A tensor that holds
several matrices is stepped as views; for optimizers that update its parts separately but step it
whole (Muon) its rows are scaled instead (`row_scaling`).
"""

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from megatron_llr.param_groups.probe import Stepping, stepping, takes_new_groups
from megatron_llr.param_groups.row_scaling import RowScaling
from megatron_llr.param_groups.step_plan import StepPlan, equal_multipliers
from megatron_llr.param_groups.stepped_tensor import SteppedTensor
from megatron_llr.param_groups.views import FusedTensor, Part

# What a layer group sets for itself; everything else that a step changes goes back to the base.
_OWN_KEYS = frozenset({"params", "lr", "weight_decay"})

Step = Callable[..., Any]
"""The optimizer's own step without its hooks: (optimizer, *args, **kwargs)."""


class GroupedStep:
    """Steps one inner optimizer with a param group for every distinct multiplier.

    Args:
        optimizer: the inner optimizer.
        parts: id of a stepped tensor -> the tensor and the matrices in it.
        factors: multiplier -> factors on the learning rate and on the weight decay.

    Attributes:
        takes: the views that the optimizer can step.
        plan: the groups of the last step; kept while tensors and equal multipliers stay.
        views: id of a stepped tensor -> its views, where it was stepped as such.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        parts: Mapping[int, tuple[SteppedTensor, tuple[Part, ...]]],
        factors: Callable[[float], tuple[float, float]],
    ) -> None:
        self.takes: Stepping = stepping(optimizer)
        self.plan: StepPlan | None = None
        self.views: dict[int, FusedTensor] = {}
        self._optimizer = optimizer
        self._parts = parts
        self._factors = factors
        self._matrices = [matrix for _, found in parts.values() for matrix, _ in found]
        self._row_scaling = RowScaling(optimizer, factors)
        self._group_by_group = self.takes == "whole" and not takes_new_groups(optimizer)
        self._planned_for: Mapping[str, float] | None = None
        self._classes: Mapping[str, int] = {}

    def is_inseparable(self, tensor: torch.Tensor) -> bool:
        """Whether the matrices in a tensor must share one multiplier."""
        _, parts = self._parts.get(id(tensor), (None, ()))
        return self.takes == "whole" and len(parts) > 1 and not self._can_scale_rows(tensor)

    def _can_scale_rows(self, tensor: torch.Tensor) -> bool:
        return self._parts[id(tensor)][0].split and self._row_scaling.is_possible

    def step(
        self, own_step: Step, multipliers: Mapping[str, float], *args: Any, **kwargs: Any
    ) -> Any:
        """Call the optimizer's own step on the layer groups.

        Args:
            own_step: the step of the optimizer's class, without hooks.
            multipliers: of the matrices; 1 where not named.
            args: passed on.
            kwargs: passed on.
        """
        with self._layer_groups(multipliers) as groups:
            if not self._group_by_group:
                return own_step(self._optimizer, *args, **kwargs)
            # Each stands in the place of the group that it is a part of, with empty others: the
            # optimizer steps only as many groups as it was constructed with.
            bases = [pieces[0] for pieces in groups]
            for place, pieces in enumerate(groups):
                for piece in pieces:
                    self._optimizer.param_groups = [
                        piece if number == place else {**base, "params": []}
                        for number, base in enumerate(bases)
                    ]
                    own_step(self._optimizer, *args, **kwargs)
            return None

    @contextlib.contextmanager
    def _layer_groups(
        self, multipliers: Mapping[str, float]
    ) -> Iterator[list[list[dict[str, Any]]]]:
        """Inside, the optimizer has layer groups; afterwards its own, with what the step changed.

        Yields the layer groups that replace each of its own.
        """
        inner: Any = self._optimizer
        own_groups, own_state = inner.param_groups, inner.state
        plan = self._plan_for(own_groups, multipliers)
        groups = plan.fill(own_groups, multipliers, self._settings)
        try:
            for tensor, parts in plan.scaled:
                self._scale_rows(tensor, parts, multipliers)
            for fused in plan.fused:
                fused.slice_gradient()
            if plan.fused:
                inner.state = _state_with_views(own_state, plan.fused)
            inner.param_groups = [piece for pieces in groups for piece in pieces]
            yield groups
            _write_back(own_groups, groups)
            if plan.fused:
                _return_state(own_state, inner.state, plan)
        finally:
            inner.param_groups, inner.state = own_groups, own_state
            for fused in plan.fused:
                fused.release_gradient()
            self._row_scaling.clear()

    def _plan_for(self, groups: list[dict[str, Any]], multipliers: Mapping[str, float]) -> StepPlan:
        """The plan of the last step, if it still holds; else a new one."""
        if self._planned_for is not multipliers:
            self._classes = equal_multipliers(dict.fromkeys(self._matrices), multipliers)
            self._planned_for = multipliers
        if self.plan is None or not self.plan.fits(groups, self._classes):
            view = None if self.takes == "whole" else self._views_of
            self.plan = StepPlan(groups, self._parts, self._classes, view)
        return self.plan

    def _views_of(self, tensor: torch.Tensor, parts: tuple[Part, ...]) -> FusedTensor:
        views = self.views.get(id(tensor))
        if views is None or views.is_stale() or views.parts != parts:
            strided = self.takes == "strided"
            views = self.views[id(tensor)] = FusedTensor(tensor, parts, strided=strided)
        return views

    def _scale_rows(
        self, tensor: torch.Tensor, parts: tuple[Part, ...], multipliers: Mapping[str, float]
    ) -> None:
        if not self._can_scale_rows(tensor):
            raise RuntimeError(
                f"{type(self._optimizer).__name__} cannot step {[m for m, _ in parts]} at "
                "different rates in this step, which has a closure, a gradient scaler, or a "
                "gradient that is not contiguous fp32 or bf16"
            )
        self._row_scaling.scale(tensor, parts, multipliers)

    def _settings(self, base: dict[str, Any], multiplier: float) -> dict[str, Any]:
        """What a layer group has of its own."""
        on_rate, on_decay = self._factors(multiplier)
        # A copy where the rate is a tensor: the scheduler overwrites that in place.
        own = {"lr": base["lr"] * on_rate}
        if "weight_decay" in base:
            own["weight_decay"] = base["weight_decay"] * on_decay
        if isinstance(base.get("step"), torch.Tensor):
            own["step"] = base["step"].clone()
        return own


def _state_with_views(own: Mapping[Any, Any], viewed: list[FusedTensor]) -> dict[Any, Any]:
    """The optimizer's state, with that of views in place of the tensors that they show."""
    lent: dict[Any, Any] = defaultdict(dict)
    whole = {id(fused.tensor) for fused in viewed}
    lent.update((tensor, state) for tensor, state in own.items() if id(tensor) not in whole)
    for fused in viewed:
        fused.lend_state(own.get(fused.tensor, {}), lent)
    return lent


def _return_state(own: Any, lent: Mapping[Any, Any], plan: StepPlan) -> None:
    for tensor, state in lent.items():
        if id(tensor) not in plan.views:
            own[tensor] = state
    for fused in plan.fused:
        fused.return_state(own[fused.tensor], lent)


def _write_back(own_groups: list[dict[str, Any]], groups: list[list[dict[str, Any]]]) -> None:
    """Carry into the optimizer's groups what the step changed in the layer groups."""
    for base, pieces in zip(own_groups, groups, strict=True):
        piece = pieces[0]
        if piece is base:
            continue
        for key in piece.keys() - _OWN_KEYS:
            if isinstance(base.get(key), torch.Tensor):
                base[key].copy_(piece[key])
            else:
                base[key] = piece[key]
