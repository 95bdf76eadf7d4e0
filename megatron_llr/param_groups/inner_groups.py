"""Layer param groups: installed while an inner optimizer steps, and gone before anyone looks.

Megatron's own groups stay as it built them, so its checkpoints do too. During `step()` alone the
inner optimizer sees groups in which every logical matrix has its own learning rate, or its own
weight decay.
"""

import logging
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch

from megatron_llr.errors import user_error
from megatron_llr.param_groups.fused_adam import (
    AdamKind,
    FusedAdamStep,
    reason_against,
    recognize,
)
from megatron_llr.param_groups.probe import stepping
from megatron_llr.param_groups.row_scaling import RowScaling
from megatron_llr.param_groups.step_plan import StepPlan, equal_multipliers
from megatron_llr.param_groups.stepped_tensor import SteppedTensor
from megatron_llr.param_groups.updates import UpdateRecorder
from megatron_llr.param_groups.views import FusedTensor, Part

logger = logging.getLogger(__name__)

# What a layer group sets for itself; everything else that a step changes goes back to the base.
_OWN_KEYS = frozenset({"params", "lr", "weight_decay"})


class InnerGroups:
    """The layer groups of one inner torch optimizer.

    Args:
        optimizer: the inner optimizer.
        parts: id of a stepped tensor -> the tensor and the matrices in it.
        decoupled_decay: whether a matrix decays as at multiplier 1.
        on_decay: whether the multipliers are factors on the weight decay, not on the rate.
        way: `auto` takes the fused way where it can, `fused` demands it, `grouped` avoids it.

    Raises:
        ValueError: if `way` is `fused` and the optimizer cannot be stepped so.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        parts: Mapping[int, tuple[SteppedTensor, tuple[Part, ...]]],
        *,
        decoupled_decay: bool,
        on_decay: bool = False,
        way: str = "auto",
    ) -> None:
        self.optimizer = optimizer
        self.multipliers: Mapping[str, float] = {}
        self.stepping = stepping(optimizer)
        self.parts = parts
        self.recorder: UpdateRecorder | None = None
        self._decoupled_decay = decoupled_decay
        self._on_decay = on_decay
        self.matrices = list(dict.fromkeys(m for _, found in parts.values() for m, _ in found))
        self._plan: StepPlan | None = None
        self._planned_for: Mapping[str, float] | None = None
        self._numbers: Mapping[str, int] = {}
        self._fused: dict[int, FusedTensor] = {}
        self._depth = 0
        self._base_groups: list[dict[str, Any]] = []
        self._base_state: Any = None
        self._pieces: list[list[dict[str, Any]]] = []
        self._viewed: list[FusedTensor] = []
        self._row_scaling = RowScaling(optimizer, self._factors)
        self._rates: list[tuple[Any, list[torch.Tensor]]] = []
        self._fused_adam = self._make_fused(way)
        self._stepped_for: Mapping[str, float] | None = None
        self._in_fused = False
        self._register()

    def _make_fused(self, way: str) -> FusedAdamStep | None:
        tensors = [p for group in self.optimizer.param_groups for p in group["params"]]
        if way == "grouped" or not tensors:
            return None
        reason = reason_against(self.optimizer, tensors)
        kind = recognize(self.optimizer) if reason is None else reason
        if isinstance(kind, AdamKind):
            return FusedAdamStep(self.optimizer, self.parts, kind)
        name = type(self.optimizer).__name__
        if way == "fused":
            raise user_error(
                f"--llr-step fused cannot step {name}: {kind}",
                got="--llr-step fused",
                allowed="an Adam optimizer with fp32 weights and moments on a CUDA device",
                remedy="use --llr-step auto, which steps it in param groups",
            )
        if any(tensor.device.type == "cuda" for tensor in tensors):
            logger.info("megatron_llr: %s is stepped in param groups: %s", name, kind)
        return None

    def _register(self) -> None:
        inner: Any = self.optimizer
        inner.register_step_pre_hook(lambda *_: self._enter())
        handle = inner.register_step_post_hook(lambda *_: self._leave())
        # Before other post-hooks: they may walk the groups and must find the base ones.
        inner._optimizer_step_post_hooks.move_to_end(handle.id, last=False)
        unguarded = inner.step

        def guarded(*args: Any, **kwargs: Any) -> Any:
            if self._fused_adam is not None:
                if self._takes_fused(args, kwargs) and self._step_fused():
                    return None
                self._fused_adam.forget_counts()
            try:
                return unguarded(*args, **kwargs)
            finally:
                self._restore()

        def step(*args: Any, **kwargs: Any) -> Any:
            if self.recorder is None:
                return guarded(*args, **kwargs)
            # Around all hooks, since other post-hooks may copy weights back.
            with self.recorder.around_step():
                return guarded(*args, **kwargs)

        # torch runs no post-hook when a step raises; this restores the groups even then.
        inner.step = step

    def _takes_fused(self, args: Any, kwargs: Any) -> bool:
        """Whether a step goes to the fused way: equal multipliers of 1 take the optimizer's own."""
        with_closure = any(value is not None for value in [*args, *kwargs.values()])
        return not with_closure and any(factor != 1.0 for factor in self.multipliers.values())

    def _step_fused(self) -> bool:
        """One fused step between the optimizer's hooks; False if its gradients do not allow it."""
        inner: Any = self.optimizer
        assert self._fused_adam is not None
        self._in_fused = True
        try:
            for hook in inner._optimizer_step_pre_hooks.values():
                hook(inner, (), {})
            moved = self._stepped_for is not self.multipliers
            if not self._fused_adam.step(self.multipliers, self._factors, multipliers_moved=moved):
                return False
            self._stepped_for = self.multipliers
            self._rates = [(group["lr"] * 1.0, group["params"]) for group in inner.param_groups]
            for hook in inner._optimizer_step_post_hooks.values():
                hook(inner, (), {})
        finally:
            self._in_fused = False
        return True

    def _enter(self) -> None:
        if self._in_fused:
            return
        # A subclass whose step calls super().step() fires the hooks twice.
        self._depth += 1
        if self._depth == 1 and self.multipliers:
            self._install()

    def _leave(self) -> None:
        if self._in_fused:
            return
        self._depth -= 1
        if self._depth == 0:
            self._write_back()
            self._restore()

    def _install(self) -> None:
        inner = self.optimizer
        self._base_groups, self._base_state = inner.param_groups, inner.state
        plan = self._plan_of(self._base_groups)
        for tensor, parts in plan.scaled:
            assert not self.is_inseparable(tensor), f"one multiplier for {[m for m, _ in parts]}"
            self._row_scaling.scale(tensor, parts, self.multipliers)
        for fused in plan.fused:
            fused.slice_gradient()
        self._viewed = plan.fused
        self._pieces = plan.fill(self._base_groups, self.multipliers, self._settings)
        # A rate that is a tensor is overwritten in place by the scheduler.
        self._rates = [(group["lr"] * 1.0, group["params"]) for group in self._base_groups]
        if self._viewed:
            inner.state = self._lent_state()  # type: ignore[assignment]
        inner.param_groups = [piece for pieces in self._pieces for piece in pieces]

    def _plan_of(self, groups: list[dict[str, Any]]) -> StepPlan:
        """The plan of the last step, if it still holds; else a new one."""
        if self._planned_for is not self.multipliers:
            self._numbers = equal_multipliers(self.matrices, self.multipliers)
            self._planned_for = self.multipliers
        if self._plan is None or not self._plan.fits(groups, self._numbers):
            show = None if self.stepping == "whole" else self._show
            self._plan = StepPlan(groups, self.parts, self._numbers, show)
        return self._plan

    def _show(self, tensor: torch.Tensor, parts: tuple[Part, ...]) -> FusedTensor:
        fused = self._fused.get(id(tensor))
        if fused is None or fused.is_stale() or fused.parts != parts:
            strided = self.stepping == "strided"
            fused = self._fused[id(tensor)] = FusedTensor(tensor, parts, strided=strided)
        return fused

    def _settings(self, base: dict[str, Any], multiplier: float) -> dict[str, Any]:
        """What a piece of a group has of its own."""
        on_rate, on_decay = self._factors(multiplier)
        # A copy where the rate is a tensor: the scheduler overwrites that in place.
        found = {"lr": base["lr"] * on_rate}
        if "weight_decay" in base:
            found["weight_decay"] = base["weight_decay"] * on_decay
        if isinstance(base.get("step"), torch.Tensor):
            found["step"] = base["step"].clone()
        return found

    def _factors(self, multiplier: float) -> tuple[float, float]:
        """Factors on the learning rate and on the weight decay."""
        if self._on_decay:
            return 1.0, multiplier
        return multiplier, 1.0 / multiplier if self._decoupled_decay else 1.0

    def is_inseparable(self, tensor: torch.Tensor) -> bool:
        """Whether the matrices in a tensor must share one multiplier."""
        _, parts = self.parts.get(id(tensor), (None, ()))
        whole = self.stepping == "whole" and not self._row_scaling.takes(tensor)
        return whole and len(parts) > 1

    def _lent_state(self) -> dict[Any, Any]:
        lent: dict[Any, Any] = defaultdict(dict)
        whole = {id(fused.tensor) for fused in self._viewed}
        for tensor, state in self._base_state.items():
            if id(tensor) not in whole:
                lent[tensor] = state
        for fused in self._viewed:
            fused.lend_state(self._base_state.get(fused.tensor, {}), lent)
        return lent

    def _write_back(self) -> None:
        """Carry into the base groups and state what the step changed in the layer groups."""
        if not self._base_groups:
            return
        for base, pieces in zip(self._base_groups, self._pieces, strict=True):
            piece = pieces[0]
            if piece is base:
                continue
            for key in piece.keys() - _OWN_KEYS:
                if isinstance(base.get(key), torch.Tensor):
                    base[key].copy_(piece[key])
                else:
                    base[key] = piece[key]
        if not self._viewed:
            return
        lent = self.optimizer.state
        assert self._plan is not None
        for tensor, state in lent.items():
            if id(tensor) not in self._plan.views:
                self._base_state[tensor] = state
        for fused in self._viewed:
            fused.return_state(self._base_state[fused.tensor], lent)

    def _restore(self) -> None:
        """Put Megatron's groups and state back; nothing to do if they stand."""
        if self._base_groups:
            self.optimizer.param_groups = self._base_groups
            self.optimizer.state = self._base_state
        for fused in self._viewed:
            fused.release_gradient()
        self._row_scaling.clear()
        self._base_groups, self._base_state = [], None
        self._pieces, self._viewed, self._depth = [], [], 0

    def base_rates(self) -> dict[int, float]:
        """Id of a stepped tensor -> base learning rate that the last step used for it."""
        return {id(tensor): float(rate) for rate, tensors in self._rates for tensor in tensors}
