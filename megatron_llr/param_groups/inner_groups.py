"""Layer param groups of one inner optimizer: there while it steps, and gone before anyone looks.

Megatron's own groups stay as it built them, so its checkpoints do too. During `step()` alone the
inner optimizer sees groups in which every logical matrix has its own learning rate, or its own
weight decay; or the fused step takes its place.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from types import MethodType
from typing import Any

import torch

from megatron_llr.param_groups.fused_adam import FusedAdamStep, fused_step
from megatron_llr.param_groups.probe import stepping, takes_new_groups
from megatron_llr.param_groups.row_scaling import RowScaling
from megatron_llr.param_groups.step_plan import StepPlan, equal_multipliers
from megatron_llr.param_groups.stepped_tensor import SteppedTensor
from megatron_llr.param_groups.views import FusedTensor, Part

# What a layer group sets for itself; everything else that a step changes goes back to the base.
_OWN_KEYS = frozenset({"params", "lr", "weight_decay"})


class InnerGroups:
    """The layer groups of one inner torch optimizer.

    Args:
        optimizer: the inner optimizer.
        parts: id of a stepped tensor -> the tensor and the matrices in it.
        decoupled_decay: whether a matrix decays as at multiplier 1.
        on_decay: whether the multipliers are factors on the weight decay, not on the rate.
        step: `--llr-step`: auto, fused or grouped.

    Attributes:
        around_step: makes a context in which the optimizer steps, all its hooks included.

    Raises:
        ValueError: if `step` is fused and the optimizer cannot be stepped so.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        parts: Mapping[int, tuple[SteppedTensor, tuple[Part, ...]]],
        *,
        decoupled_decay: bool,
        on_decay: bool = False,
        step: str = "auto",
    ) -> None:
        self.optimizer = optimizer
        self.multipliers: Mapping[str, float] = {}
        self.stepping = stepping(optimizer)
        self.parts = parts
        self.around_step: Callable[[], AbstractContextManager[None]] | None = None
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
        self._fused_adam = fused_step(optimizer, parts, step)
        self._steps_fused = False
        self._one_by_one = self.stepping == "whole" and not takes_new_groups(optimizer)
        self._register()

    def _register(self) -> None:
        inner: Any = self.optimizer
        inner.register_step_pre_hook(lambda *_: self._enter())
        handle = inner.register_step_post_hook(lambda *_: self._leave())
        # Before other post-hooks: they may walk the groups and must find the base ones.
        inner._optimizer_step_post_hooks.move_to_end(handle.id, last=False)
        unguarded = inner.step

        def guarded(*args: Any, **kwargs: Any) -> Any:
            if self._fused_adam is not None:
                if self._takes_fused(args, kwargs) and self._step_fused(self._fused_adam):
                    return None
                self._fused_adam.forget_counts()
            try:
                if self._one_by_one and self.multipliers:
                    return self._step_one_by_one(*args, **kwargs)
                return unguarded(*args, **kwargs)
            finally:
                self._restore()

        def step(_: Any, *args: Any, **kwargs: Any) -> Any:
            if self.around_step is None:
                return guarded(*args, **kwargs)
            # Around all hooks, since other post-hooks may copy weights back.
            with self.around_step():
                return guarded(*args, **kwargs)

        # torch runs no post-hook when a step raises; this restores the groups even then.
        # Bound, as torch's schedulers of learning rates expect of a step that they wrap.
        if hasattr(unguarded, "_wrapped_by_lr_sched"):
            step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
        inner.step = MethodType(step, inner)

    def _takes_fused(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Whether the fused way takes this step; multiplier 1 everywhere takes the optimizer's own.

        A closure, and a gradient scaler that leaves unscaling to the optimizer, are for the
        optimizer's own step too.
        """
        inner: Any = self.optimizer
        given = (*args, *kwargs.values())
        scaler = (getattr(inner, name, None) for name in ("grad_scale", "found_inf"))
        return all(value is None for value in (*given, *scaler)) and any(
            multiplier != 1.0 for multiplier in self.multipliers.values()
        )

    def _step_fused(self, fused: FusedAdamStep) -> bool:
        """One fused step inside the optimizer's hooks; False if it cannot take the gradients."""
        if not fused.takes_gradients():
            return False
        inner: Any = self.optimizer
        self._steps_fused = True
        try:
            # The optimizer's hooks and its entry in a profile, as around its own step.
            hooked = torch.optim.Optimizer.profile_hook_step(self._fused_body)
            hooked(inner)
        finally:
            self._steps_fused = False
        # A scheduler that wrapped the step before this class notes a call in its wrapper alone.
        inner._opt_called = True
        return True

    def _step_one_by_one(self, *args: Any, **kwargs: Any) -> Any:
        """Step every layer group by itself, for an optimizer that takes no more groups than it had.

        Each stands in the place of the group that it is a part of, beside empty ones.
        """
        inner: Any = self.optimizer
        step = type(inner).step
        bare = step.__wrapped__ if getattr(step, "hooked", False) else step

        def body(optimizer: Any, *args: Any, **kwargs: Any) -> None:
            for number, pieces in enumerate(self._pieces):
                for piece in pieces:
                    optimizer.param_groups = [
                        piece if place == number else {**base, "params": []}
                        for place, base in enumerate(self._base_groups)
                    ]
                    bare(optimizer, *args, **kwargs)

        torch.optim.Optimizer.profile_hook_step(body)(inner, *args, **kwargs)
        inner._opt_called = True

    def _fused_body(self, inner: Any, *_: Any, **__: Any) -> None:
        assert self._fused_adam is not None
        self._fused_adam.step(self.multipliers, self._factors)
        self._note_rates(inner.param_groups)

    def _note_rates(self, groups: list[dict[str, Any]]) -> None:
        # A rate that is a tensor is overwritten in place by the scheduler.
        self._rates = [(group["lr"] * 1.0, group["params"]) for group in groups]

    def _enter(self) -> None:
        if self._steps_fused:
            return
        # A subclass whose step calls super().step() fires the hooks twice.
        self._depth += 1
        if self._depth == 1 and self.multipliers:
            self._install()

    def _leave(self) -> None:
        if self._steps_fused:
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
            if not self._row_scaling.takes(tensor):
                raise RuntimeError(
                    f"{type(self.optimizer).__name__} cannot step {[m for m, _ in parts]} at "
                    "different rates in this step, which has a closure, a gradient scaler, or a "
                    "gradient that is not contiguous fp32 or bf16"
                )
            self._row_scaling.scale(tensor, parts, self.multipliers)
        for fused in plan.fused:
            fused.slice_gradient()
        self._viewed = plan.fused
        self._pieces = plan.fill(self._base_groups, self.multipliers, self._settings)
        self._note_rates(self._base_groups)
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
        if self._fused_adam is not None:
            return False
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

    @property
    def base_rates(self) -> list[tuple[Any, list[torch.Tensor]]]:
        """Base learning rates that the last step used, each with the tensors that it was for."""
        return self._rates
