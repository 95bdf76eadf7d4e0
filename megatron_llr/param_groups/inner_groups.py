"""One inner optimizer whose matrices have learning rates of their own: which way steps it, when.

Three ways, chosen at every step: the optimizer's own step while all multipliers are 1, one fused
launch (`fused_adam`), or param groups that exist only during the step (`grouped`).
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from types import MethodType
from typing import Any

import torch

from megatron_llr.param_groups.fused_adam import fused_step
from megatron_llr.param_groups.grouped import GroupedStep
from megatron_llr.param_groups.probe import Stepping
from megatron_llr.param_groups.stepped_tensor import SteppedTensor
from megatron_llr.param_groups.views import Part


class InnerGroups:
    """The layer groups of one inner torch optimizer.

    Replaces the `step` of this optimizer; its param groups and state stay as they are between
    steps.

    Args:
        optimizer: the inner optimizer.
        parts: id of a stepped tensor -> the tensor and the matrices in it.
        decoupled_decay: whether a matrix decays as at multiplier 1.
        on_decay: whether the multipliers are factors on the weight decay, not on the rate.
        step: `--llr-step`: auto, fused or grouped.

    Attributes:
        multipliers: of the next step; empty for the optimizer's own step.
        grouped: the grouped way.
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
        self.parts = parts
        self.matrices = list(dict.fromkeys(m for _, found in parts.values() for m, _ in found))
        self.multipliers: Mapping[str, float] = {}
        self.around_step: Callable[[], AbstractContextManager[None]] | None = None
        self._decoupled_decay = decoupled_decay
        self._on_decay = on_decay
        self._rates: list[tuple[Any, list[torch.Tensor]]] = []
        self.grouped = GroupedStep(optimizer, parts, self._factors)
        self._fused = fused_step(optimizer, parts, step)
        self._replace_step()

    @property
    def stepping(self) -> Stepping:
        """The views that the optimizer can step."""
        return self.grouped.takes

    def is_inseparable(self, tensor: torch.Tensor) -> bool:
        """Whether the matrices in a tensor must share one multiplier."""
        return self._fused is None and self.grouped.is_inseparable(tensor)

    @property
    def base_rates(self) -> list[tuple[Any, list[torch.Tensor]]]:
        """Base learning rates that the last step used, each with the tensors that it was for."""
        return self._rates

    def _replace_step(self) -> None:
        inner: Any = self.optimizer
        own_step = inner.step

        def step(_: Any, *args: Any, **kwargs: Any) -> Any:
            if self.around_step is None:
                return self._step(own_step, *args, **kwargs)
            # Around all hooks, since other post-hooks may copy weights back.
            with self.around_step():
                return self._step(own_step, *args, **kwargs)

        # Bound, as torch's schedulers of learning rates expect of a step that they wrap.
        if hasattr(own_step, "_wrapped_by_lr_sched"):
            step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
        inner.step = MethodType(step, inner)

    def _step(self, own_step: Any, *args: Any, **kwargs: Any) -> Any:
        if not self.multipliers:
            if self._fused is not None:
                self._fused.forget_counts()
            return own_step(*args, **kwargs)
        # The optimizer's hooks, and its entry in a profile, around whatever way steps it: they
        # see its own groups.
        result = torch.optim.Optimizer.profile_hook_step(self._step_layer_groups)(
            self.optimizer, *args, **kwargs
        )
        # A scheduler that wrapped the step before this class notes a call in its wrapper only.
        self.optimizer._opt_called = True  # type: ignore[attr-defined]
        return result

    def _step_layer_groups(self, inner: Any, *args: Any, **kwargs: Any) -> Any:
        # A rate that is a tensor is overwritten in place by the scheduler.
        self._rates = [(group["lr"] * 1.0, group["params"]) for group in inner.param_groups]
        if self._fused is not None:
            if self._takes_fused(args, kwargs):
                self._fused.step(self.multipliers, self._factors)
                return None
            self._fused.forget_counts()
        step = type(inner).step
        bare = step.__wrapped__ if getattr(step, "hooked", False) else step
        return self.grouped.step(bare, self.multipliers, *args, **kwargs)

    def _takes_fused(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Whether the fused way takes this step; multiplier 1 everywhere takes the optimizer's own.

        A closure, and a gradient scaler that leaves unscaling to the optimizer, are for the
        optimizer's own step too.
        """
        assert self._fused is not None
        given = (*args, *kwargs.values())
        scaler = (getattr(self.optimizer, name, None) for name in ("grad_scale", "found_inf"))
        return (
            all(value is None for value in (*given, *scaler))
            and any(multiplier != 1.0 for multiplier in self.multipliers.values())
            and self._fused.takes_gradients()
        )

    def _factors(self, multiplier: float) -> tuple[float, float]:
        """Factors on the learning rate and on the weight decay."""
        if self._on_decay:
            return 1.0, multiplier
        return multiplier, 1.0 / multiplier if self._decoupled_decay else 1.0
