"""Grouped stepping: during a step the optimizer has a param group per rate and weight decay.

Works for every element-wise optimizer. The optimizer's own groups and state are restored when the
step ends or fails, so Megatron's checkpoints never contain the layer groups. A tensor that holds
several matrices is stepped as views. For optimizers that step only whole tensors but update the
matrices in them separately (Muon), rows are scaled instead (`row_scaling`).
"""

import contextlib
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch

from megatron_llr.matrices.ids import MatrixId
from megatron_llr.param_groups.probe import Stepping, stepping, takes_new_groups
from megatron_llr.param_groups.row_scaling import RowScaling
from megatron_llr.param_groups.step_plan import StepPlan, equal_factors
from megatron_llr.param_groups.stepped_tensor import Factors, MatrixRanges, TensorMatrices
from megatron_llr.param_groups.views import FusedTensor

# Settings of a layer group. All others that a step changes are copied to the optimizer's group.
_OWN_KEYS = frozenset({"params", "lr", "weight_decay"})

Step = Callable[..., Any]
"""The optimizer's step without hooks: (optimizer, *args, **kwargs)."""


class GroupedStep:
    """Steps one inner optimizer with a param group for every distinct pair of factors.

    Args:
        optimizer: the inner optimizer.
        parts: id of a stepped tensor -> the tensor and the matrices in it.
        factors: factors on learning rate and weight decay of a matrix for a multiplier.

    Attributes:
        takes: the views that the optimizer can step.
        plan: the layer groups of the last step. Reused while tensors and classes are the same.
        directions: matrices that are stepped at rate 1 without decay (`hyperball`); set before the
            first step on layer groups.
        views: id of a stepped tensor -> its views, for tensors that were stepped as views.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        parts: Mapping[int, TensorMatrices],
        factors: Factors,
    ) -> None:
        self.takes: Stepping = stepping(optimizer)
        self.plan: StepPlan | None = None
        self.views: dict[int, FusedTensor] = {}
        self.directions: Collection[MatrixId] = ()
        self._optimizer = optimizer
        self._parts = parts
        self._factors = factors
        self._matrices = [matrix for _, ranges in parts.values() for matrix, _ in ranges]
        self._row_scaling = RowScaling(optimizer, factors)
        self._group_by_group = self.takes == "whole" and not takes_new_groups(optimizer)
        self._planned_for: Mapping[MatrixId, float] | None = None
        self._classes: Mapping[MatrixId, int] = {}

    def is_inseparable(self, tensor: torch.Tensor) -> bool:
        """Whether the matrices in a tensor must share one multiplier."""
        _, parts = self._parts.get(id(tensor), (None, ()))
        return self.takes == "whole" and len(parts) > 1 and not self._can_scale_rows(tensor)

    def _can_scale_rows(self, tensor: torch.Tensor) -> bool:
        return self._parts[id(tensor)][0].split and self._row_scaling.is_possible

    def step(
        self, own_step: Step, multipliers: Mapping[MatrixId, float], *args: Any, **kwargs: Any
    ) -> Any:
        """Call the optimizer's step on the layer groups.

        Args:
            own_step: the step of the optimizer's class, without hooks.
            multipliers: of the matrices. Default 1.
            args: arguments of `own_step`.
            kwargs: arguments of `own_step`.
        """
        with self._layer_groups(multipliers) as groups:
            if not self._group_by_group:
                return own_step(self._optimizer, *args, **kwargs)
            # The optimizer steps only as many groups as it was constructed with. Each layer group
            # takes the place of the group that it replaces, and the other groups are empty.
            bases = [layer_groups[0] for layer_groups in groups]
            for place, layer_groups in enumerate(groups):
                for layer_group in layer_groups:
                    self._optimizer.param_groups = [
                        layer_group if index == place else {**base, "params": []}
                        for index, base in enumerate(bases)
                    ]
                    own_step(self._optimizer, *args, **kwargs)
            return None

    @contextlib.contextmanager
    def _layer_groups(
        self, multipliers: Mapping[MatrixId, float]
    ) -> Iterator[list[list[dict[str, Any]]]]:
        """Replace the optimizer's groups; on exit restore them, with the changes of the step.

        Yields the layer groups that replace each of its groups.
        """
        inner: Any = self._optimizer
        own_groups, own_state = inner.param_groups, inner.state
        plan = self._plan_for(own_groups, multipliers)
        groups = plan.fill(own_groups, multipliers, self._factors)
        try:
            for tensor, parts in plan.scaled:
                self._scale_rows(tensor, parts, multipliers)
            for fused in plan.fused:
                fused.slice_gradient()
            if plan.fused:
                # The state of views instead of that of their tensors.
                whole = {id(fused.tensor) for fused in plan.fused}
                inner.state = defaultdict(dict)
                inner.state.update((t, s) for t, s in own_state.items() if id(t) not in whole)
                for fused in plan.fused:
                    fused.lend_state(own_state.get(fused.tensor, {}), inner.state)
            inner.param_groups = [group for layer_groups in groups for group in layer_groups]
            yield groups
            _copy_changed_settings(own_groups, groups)
            if plan.fused:
                for tensor, state in inner.state.items():
                    if id(tensor) not in plan.views:
                        own_state[tensor] = state
                for fused in plan.fused:
                    fused.return_state(own_state[fused.tensor], inner.state)
        finally:
            inner.param_groups, inner.state = own_groups, own_state
            for fused in plan.fused:
                fused.release_gradient()
            self._row_scaling.clear()

    def _plan_for(
        self, groups: list[dict[str, Any]], multipliers: Mapping[MatrixId, float]
    ) -> StepPlan:
        """The plan of the last step if it is still valid, otherwise a new one."""
        if self._planned_for is not multipliers:
            self._classes = equal_factors(
                dict.fromkeys(self._matrices), multipliers, self._factors, self.directions
            )
            self._planned_for = multipliers
        if self.plan is None or not self.plan.fits(groups, self._classes):
            make_views = None if self.takes == "whole" else self._views_of
            self.plan = StepPlan(groups, self._parts, self._classes, make_views)
        return self.plan

    def _views_of(self, tensor: torch.Tensor, parts: tuple[MatrixRanges, ...]) -> FusedTensor:
        views = self.views.get(id(tensor))
        if views is None or views.is_stale() or views.parts != parts:
            strided = self.takes == "strided"
            views = self.views[id(tensor)] = FusedTensor(tensor, parts, strided=strided)
        return views

    def _scale_rows(
        self,
        tensor: torch.Tensor,
        parts: tuple[MatrixRanges, ...],
        multipliers: Mapping[MatrixId, float],
    ) -> None:
        if not self._can_scale_rows(tensor):
            raise RuntimeError(
                f"{type(self._optimizer).__name__} cannot step {[m for m, _ in parts]} at "
                "different rates in this step, which has a closure, a gradient scaler, or a "
                "gradient that is not contiguous fp32 or bf16"
            )
        self._row_scaling.scale(tensor, parts, multipliers)


def _copy_changed_settings(
    own_groups: list[dict[str, Any]], groups: list[list[dict[str, Any]]]
) -> None:
    """Copy the settings that a step changed in the layer groups to the optimizer's groups."""
    for base, layer_groups in zip(own_groups, groups, strict=True):
        layer_group = layer_groups[0]
        if layer_group is base:
            continue
        for key in layer_group.keys() - _OWN_KEYS:
            if isinstance(base.get(key), torch.Tensor):
                base[key].copy_(layer_group[key])
            else:
                base[key] = layer_group[key]
