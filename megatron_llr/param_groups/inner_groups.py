"""Replaces the step of one inner optimizer by one with a learning rate per matrix.

Each step uses one of three ways: the optimizer's own step if all multipliers are 1, one fused
launch (`fused_adam`), or param groups that exist only during the step (`grouped`).
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from types import MethodType
from typing import Any

import torch

from megatron_llr.matrices.ids import MatrixId
from megatron_llr.param_groups.fused_adam import fused_step
from megatron_llr.param_groups.grouped import GroupedStep
from megatron_llr.param_groups.hyperball import HyperballStep
from megatron_llr.param_groups.probe import Stepping
from megatron_llr.param_groups.stepped_tensor import TensorMatrices


class InnerGroups:
    """The layer groups of one inner torch optimizer.

    Replaces the `step` of this optimizer. Between steps its param groups and state are unchanged.

    Args:
        optimizer: the inner optimizer.
        parts: id of a stepped tensor -> the tensor and the matrices in it.
        decoupled_decay: whether weight decay is independent of the multiplier.
        on_decay: whether multipliers scale the weight decay instead of the learning rate.
        step: `--llr-step`: auto, fused or grouped.

    Attributes:
        multipliers: for the next step. Empty: the optimizer's own step.
        decay_factors: factors on the weight decay besides those of the multipliers, default 1; set
            before the first step on layer groups.
        grouped: grouped stepping.
        hyperball: the hyperball step of some of its matrices, from the start of training on.
        around_step: creates a context manager around the step and all its hooks.

    Raises:
        ValueError: if `step` is fused and the fused step does not support the optimizer.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        parts: Mapping[int, TensorMatrices],
        *,
        decoupled_decay: bool,
        on_decay: bool = False,
        step: str = "auto",
    ) -> None:
        self.optimizer = optimizer
        self.parts = parts
        self.matrices = list(dict.fromkeys(m for _, ranges in parts.values() for m, _ in ranges))
        self.multipliers: Mapping[MatrixId, float] = {}
        self.decay_factors: Mapping[MatrixId, float] = {}
        self.hyperball: HyperballStep | None = None
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

    def has_fp32_weights(self, tensor: torch.Tensor) -> bool:
        """Whether the weights that a step changes are fp32: a tensor, or those in its state."""
        in_state = self._fused is not None and self._fused.has_fp32_weights(tensor)
        return tensor.dtype == torch.float32 or in_state

    @property
    def base_rates(self) -> list[tuple[Any, list[torch.Tensor]]]:
        """Base learning rates of the last step, each with the tensors of its param group."""
        return self._rates

    def _replace_step(self) -> None:
        inner: Any = self.optimizer
        own_step = inner.step

        def step(_: Any, *args: Any, **kwargs: Any) -> Any:
            if self.around_step is None:
                return self._step(own_step, *args, **kwargs)
            # Outside all hooks, since post-hooks may copy weights back.
            with self.around_step():
                return self._step(own_step, *args, **kwargs)

        # A bound method, as torch's learning rate schedulers expect of a step that they wrap.
        if hasattr(own_step, "_wrapped_by_lr_sched"):
            step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
        inner.step = MethodType(step, inner)

    def _step(self, own_step: Any, *args: Any, **kwargs: Any) -> Any:
        if not self.multipliers and self.hyperball is None:
            if self._fused is not None:
                self._fused.forget_counts()
            return own_step(*args, **kwargs)
        # The optimizer's hooks and profiler record are outside the layer groups, so they see its
        # own groups.
        result = torch.optim.Optimizer.profile_hook_step(self._step_layer_groups)(
            self.optimizer, *args, **kwargs
        )
        # A scheduler that wrapped the step earlier sets this only in its wrapper.
        self.optimizer._opt_called = True  # type: ignore[attr-defined]
        return result

    def _step_layer_groups(self, inner: Any, *args: Any, **kwargs: Any) -> Any:
        # A copy, since the scheduler overwrites a rate that is a tensor in place.
        self._rates = [(group["lr"] * 1.0, group["params"]) for group in inner.param_groups]
        if self.hyperball is not None:
            return self._step_hyperball(inner, self.hyperball, *args, **kwargs)
        if self._fused is not None:
            if self._can_step_fused(args, kwargs):
                self._fused.step(self.multipliers, self._factors)
                return None
            self._fused.forget_counts()
        return self.grouped.step(_step_without_hooks(inner), self.multipliers, *args, **kwargs)

    def _step_hyperball(
        self, inner: Any, hyperball: HyperballStep, *args: Any, **kwargs: Any
    ) -> Any:
        # A later entry of a tensor replaces an earlier one.
        self._rates += [
            (hyperball.learning_rate(group), hyperball.tensors_of(group))
            for group in inner.param_groups
        ]
        if self._fused is not None:
            if self._can_step_fused(args, kwargs):
                self._fused.step(self.multipliers, self._factors)
                return None
            self._fused.forget_counts()
        with hyperball.project(self.multipliers):
            return self.grouped.step(_step_without_hooks(inner), self.multipliers, *args, **kwargs)

    def start_hyperball(self, hyperball: HyperballStep) -> None:
        """Use a hyperball step for its matrices from now on.

        Raises:
            TypeError: if a tensor and its state have no fp32 weights.
        """
        for tensor, _ in hyperball.tensors.values():
            if not self.has_fp32_weights(tensor):
                raise TypeError(
                    f"a hyperball step needs fp32 weights in the optimizer; those of a "
                    f"{tuple(tensor.shape)} tensor are {tensor.dtype}"
                )
        if self._fused is not None:
            self._fused.start_hyperball(hyperball)
        self.hyperball = hyperball
        self.grouped.directions = hyperball.matrices

    def _can_step_fused(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Whether the fused step supports the gradients and arguments of this step.

        False with a closure, with a gradient scaler that leaves unscaling to the optimizer, and,
        without a hyperball step, if all factors are 1, so that the result is exactly that of the
        optimizer's own step.
        """
        assert self._fused is not None
        arguments = (*args, *kwargs.values())
        scaler = (getattr(self.optimizer, name, None) for name in ("grad_scale", "found_inf"))
        return (
            all(value is None for value in (*arguments, *scaler))
            and (
                self.hyperball is not None
                or bool(self.decay_factors)
                or any(multiplier != 1.0 for multiplier in self.multipliers.values())
            )
            and self._fused.takes_gradients()
        )

    def _factors(self, matrix: MatrixId, multiplier: float) -> tuple[float, float]:
        """Factors on the learning rate and on the weight decay."""
        decay = self.decay_factors.get(matrix, 1.0)
        if self._on_decay:
            return 1.0, multiplier * decay
        if self._decoupled_decay and multiplier > 0:
            return multiplier, decay / multiplier
        # At multiplier 0 as in a step at learning rate 0, which does not decay weights either; L2
        # decay still enters the moments.
        return multiplier, decay


def _step_without_hooks(optimizer: Any) -> Any:
    step = type(optimizer).step
    return step.__wrapped__ if getattr(step, "hooked", False) else step
