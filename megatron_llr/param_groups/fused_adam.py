"""Fused stepping: one kernel launch for all tensors of an Adam optimizer.

Weights, moments and step counters are the optimizer's, under its own names, so a checkpoint does
not depend on whether steps were fused.
"""

import logging
from collections.abc import Mapping, Sequence
from operator import is_
from typing import TYPE_CHECKING, Any

import torch

from megatron_llr.config import flag
from megatron_llr.errors import input_error
from megatron_llr.matrices.ids import MatrixId
from megatron_llr.param_groups.adam_layout import MASTER, MOMENTS
from megatron_llr.param_groups.fused_support import (
    is_on_cuda,
    is_readable_gradient,
    layouts_of,
    reason_unsupported,
    require_readable,
    upload_into,
)
from megatron_llr.param_groups.rate_rows import RateRow, rate_rows
from megatron_llr.param_groups.stepped_tensor import Factors, TensorMatrices

if TYPE_CHECKING:
    from megatron_llr.param_groups.adam_kernel import Chunks, Formula
    from megatron_llr.param_groups.fused_hyperball import FusedProjection
    from megatron_llr.param_groups.hyperball import HyperballStep

logger = logging.getLogger(__name__)


def fused_step(
    optimizer: torch.optim.Optimizer, parts: Mapping[int, TensorMatrices], step: str
) -> "FusedAdamStep | None":
    """The fused step of an optimizer, or None if it is not used.

    Args:
        optimizer: the inner optimizer.
        parts: id of a stepped tensor -> the tensor and the matrices in it.
        step: `--llr-step`: auto, fused or grouped.

    Raises:
        ValueError: if `step` is fused and the fused step does not support the optimizer.
    """
    tensors = [tensor for group in optimizer.param_groups for tensor in group["params"]]
    if step == "grouped" or not tensors:
        return None
    name, reason = type(optimizer).__name__, reason_unsupported(optimizer)
    if reason is None:
        return FusedAdamStep(optimizer, parts)
    if step == "fused":
        raise input_error(
            f"{flag('step')} fused cannot step {name}: {reason}. It needs triton and an Adam "
            "optimizer with fp32 weights and moments on a CUDA device. Otherwise, set "
            f"{flag('step')} auto"
        )
    if any(map(is_on_cuda, tensors)):
        logger.warning("megatron_llr: %s is stepped in param groups, not fused: %s", name, reason)
    return None


class FusedAdamStep:
    """Steps all tensors of one inner optimizer, every matrix at its own learning rate.

    The tables of chunks are built once, and again when tensors, their memory, their matrices or the
    dtype of their gradients change. A step uploads the addresses of gradients if any has changed,
    and one small table of rates and bias corrections. It does not wait for the device. There is one
    launch for each combination of betas, eps, and dtypes of gradients and weights; with hyperball
    steps there are two.

    Args:
        optimizer: the inner optimizer.
        parts: id of a stepped tensor -> the tensor and the matrices in it.

    Raises:
        ValueError: if `reason_unsupported` returns a reason.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, parts: Mapping[int, TensorMatrices]
    ) -> None:
        layouts = layouts_of(optimizer)
        if isinstance(layouts, str):
            raise ValueError(f"the fused step cannot step {type(optimizer).__name__}: {layouts}")
        self.optimizer = optimizer
        self._parts = parts
        self._layouts = layouts
        # Whether counters are per tensor or per group is the same for all dtypes of an optimizer.
        self._torch_order = next(iter(layouts.values())).counter is not None
        self._tensors: list[torch.Tensor] = []
        self._memory: list[int] = []
        self._dtypes: list[torch.dtype] = []
        self._settings: list[Any] = []
        self._counters: list[Any] = []
        self._gradient_memory: list[int] = []
        self._launches: list[tuple[Formula, Chunks]] = []
        self._hyperball: HyperballStep | None = None
        self._projection: FusedProjection | None = None
        self._multipliers: Mapping[MatrixId, float] | None = None
        self._counts: torch.Tensor | None = None
        optimizer.register_load_state_dict_post_hook(lambda _: self.forget_counts())

    def forget_counts(self) -> None:
        """Read the step counters again before the next step, after a step that was not fused."""
        self._counts = None

    def start_hyperball(self, hyperball: "HyperballStep") -> None:
        """Use a hyperball step for its matrices from the next step on."""
        self._hyperball = hyperball
        self._tensors = []

    def has_fp32_weights(self, tensor: torch.Tensor) -> bool:
        """Whether the weights that a step changes are fp32: a tensor, or those in its state."""
        return tensor.dtype == torch.float32 or self._layouts[tensor.dtype].has_master

    def takes_gradients(self) -> bool:
        """Whether all gradients are dense, contiguous, and fp32 or bf16."""
        return all(map(is_readable_gradient, self._gradients(self._listed())))

    @torch.no_grad()
    def step(self, multipliers: Mapping[MatrixId, float], factors: Factors) -> None:
        """Step every tensor that has a gradient. Call only if `takes_gradients`.

        Args:
            multipliers: matrix id -> multiplier, default 1. New multipliers must be a new mapping.
            factors: factors on learning rate and weight decay of a matrix for a multiplier.
        """
        from megatron_llr.param_groups.adam_kernel import launch_adam

        groups = self.optimizer.param_groups
        tensors = self._listed()
        gradients = self._gradients(tensors)
        states = self._states_of(tensors, gradients)
        self._build_if_changed(groups, tensors, gradients, states)
        addresses = [0 if gradient is None else gradient.data_ptr() for gradient in gradients]
        if addresses != self._gradient_memory:
            self._gradient_memory = addresses
            upload_into(self._addresses[1], torch.tensor(addresses))
        if self._multipliers is not multipliers:
            self._multipliers = multipliers
            pairs = [factors(row.matrix, multipliers.get(row.matrix, 1.0)) for row in self._rows]
            self._row_factors = torch.tensor(pairs, dtype=torch.float64).view(-1, 2).t()
        self._count(groups, gradients, states)
        upload_into(self._table, self._corrections_and_rates(groups))
        split = 2 * len(self._tensors)
        corrections, rates = self._table[:split].view(2, -1), self._table[split:].view(2, -1)
        with torch.cuda.device_of(self._table):
            for index, (formula, chunks) in enumerate(self._launches):
                sums = None if self._projection is None else self._projection.sums[index]
                launch_adam(formula, chunks, self._addresses, corrections, rates, sums)
            if self._projection is not None:
                self._projection.project(multipliers, self._addresses, corrections)

    def _listed(self) -> list[torch.Tensor]:
        return [tensor for group in self.optimizer.param_groups for tensor in group["params"]]

    def _gradients(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor | None]:
        names = {layout.gradient for layout in self._layouts.values()}
        if len(names) == 1:
            (name,) = names
            return [getattr(tensor, name, None) for tensor in tensors]
        return [getattr(tensor, self._layouts[tensor.dtype].gradient, None) for tensor in tensors]

    def _states_of(
        self, tensors: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor | None]
    ) -> list[dict[str, Any]]:
        """The state of every tensor, created if the optimizer's own step would create it."""
        existing = self.optimizer.state
        states = [existing.get(tensor) or {} for tensor in tensors]
        for index, (tensor, state) in enumerate(zip(tensors, states, strict=True)):
            layout = self._layouts[tensor.dtype]
            # The projection reads weights in the state also of tensors without a gradient.
            idle = gradients[index] is None and not (layout.has_master and self._hyperball)
            if state or (idle and tensor in existing):
                continue
            keys = layout.without_gradient if idle else layout.keys
            if keys is not None:
                states[index] = existing[tensor] = layout.new_state(tensor, keys)
        return states

    def _build_if_changed(
        self,
        groups: Sequence[Mapping[str, Any]],
        tensors: Sequence[torch.Tensor],
        gradients: Sequence[torch.Tensor | None],
        states: Sequence[dict[str, Any]],
    ) -> None:
        memory = [tensor.data_ptr() for tensor in tensors]
        for key in (*MOMENTS, MASTER):
            memory += [
                0 if (value := state.get(key)) is None else value.data_ptr() for state in states
            ]
        settings = [(len(g["params"]), tuple(g["betas"]), g["eps"]) for g in groups]
        same = len(tensors) == len(self._tensors) and all(map(is_, tensors, self._tensors))
        # A tensor without a gradient in this step keeps the dtype of its previous gradient.
        before = self._dtypes if same else [torch.float32] * len(tensors)
        dtypes = [b if g is None else g.dtype for g, b in zip(gradients, before, strict=True)]
        now = (memory, dtypes, settings)
        if same and now == (self._memory, self._dtypes, self._settings):
            return
        for tensor, state in zip(tensors, states, strict=True):
            require_readable(tensor, state)
        self._tensors = list(tensors)
        self._memory, self._dtypes, self._settings = now
        self._gradient_memory, self._multipliers, self._counts = [], None, None
        self._build(groups)

    def _build(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Build the tables of chunks, addresses and rates."""
        from megatron_llr.param_groups.adam_kernel import Chunks, Formula

        group_of = [index for index, group in enumerate(groups) for _ in group["params"]]
        rows: dict[RateRow, int] = {}
        ranges: dict[Formula, list[tuple[int, int, Sequence[tuple[int, int]]]]] = {}
        for index, (tensor, dtype) in enumerate(zip(self._tensors, self._dtypes, strict=True)):
            group, layout = groups[group_of[index]], self._layouts[tensor.dtype]
            formula = Formula(
                betas=(float(group["betas"][0]), float(group["betas"][1])),
                eps=float(group["eps"]),
                decoupled=layout.decoupled,
                torch_order=self._torch_order,
                bf16_gradient=dtype == torch.bfloat16,
                has_copy=layout.has_master,
            )
            _, parts = self._parts.get(id(tensor), (None, ()))
            for row, of_row in rate_rows(tensor, parts, group_of[index], self._hyperball):
                number = rows.setdefault(row, len(rows))
                ranges.setdefault(formula, []).append((index, number, of_row))
        device = self._tensors[0].device
        self._launches = [
            (formula, Chunks.of(chunks, device)) for formula, chunks in ranges.items()
        ]
        self._rows = list(rows)
        self._group_of = torch.tensor(group_of)
        self._row_group = torch.tensor([row.group for row in self._rows])
        weights, first, second, masters = torch.tensor(self._memory).view(4, -1).unbind(0)
        has_master = torch.tensor([self._layouts[t.dtype].has_master for t in self._tensors])
        self._addresses = torch.stack(
            [
                torch.where(has_master, masters, weights),
                torch.zeros_like(weights),
                first,
                second,
                torch.where(has_master, weights, 0),
            ]
        ).to(device)
        # Bias corrections [2, tensors], then rates [2, rows], in one tensor: one upload per step.
        self._table = torch.empty(2 * len(self._tensors) + 2 * len(self._rows), device=device)
        if self._hyperball is not None:
            from megatron_llr.param_groups.fused_hyperball import FusedProjection

            self._projection = FusedProjection(self._hyperball, self._launches, self._rows)

    def _count(
        self,
        groups: Sequence[dict[str, Any]],
        gradients: Sequence[torch.Tensor | None],
        states: Sequence[dict[str, Any]],
    ) -> None:
        """Increment the step counters as the optimizer does, and their copies on the CPU."""
        if not self._torch_order:
            # apex and Transformer Engine count per group, also if a tensor has no gradient.
            for group in groups:
                if group["params"]:
                    group["step"] = int(group.get("step", 0)) + 1
            self._counts = torch.tensor([int(g.get("step", 0)) for g in groups])[self._group_of]
            return
        counters = [state.get("step") for state in states]
        if self._counts is None or not all(map(is_, counters, self._counters)):
            self._counts = self._read_counters(counters)
            self._counters = counters = [state.get("step") for state in states]
        counted = [gradient is not None for gradient in gradients]
        pairs = zip(counters, counted, strict=True)
        own = [counter for counter, counts in pairs if counts and counter is not None]
        if own:
            torch._foreach_add_(own, 1)
        self._counts += torch.tensor(counted)

    def _read_counters(self, counters: Sequence[torch.Tensor | None]) -> torch.Tensor:
        """Step of every tensor, 0 if it has no state: [tensors] fp64 on the CPU."""
        seen: set[int] = set()
        shared = 0
        for tensor, counter in zip(self._tensors, counters, strict=True):
            if counter is None:
                continue
            if counter.data_ptr() in seen:
                # A shared counter would be incremented once for each of its tensors.
                self.optimizer.state[tensor]["step"] = counter = counter.clone()
                shared += 1
            seen.add(counter.data_ptr())
        if shared:
            logger.warning(
                "megatron_llr: %s shared one step counter between %d tensors and others; each now "
                "has its own",
                type(self.optimizer).__name__,
                shared,
            )
        device = self._tensors[0].device
        none = torch.zeros((), dtype=torch.float64, device=device)
        values = [none if c is None else c.to(device, torch.float64).view(()) for c in counters]
        return torch.stack(values).cpu()

    def _corrections_and_rates(self, groups: Sequence[Mapping[str, Any]]) -> torch.Tensor:
        """Bias corrections of all tensors, then rates and decays of all rows: fp32, on the CPU."""
        assert self._counts is not None
        settings = [
            (
                float(group["lr"]),
                float(group["weight_decay"]),
                *map(float, group["betas"]),
                float(bool(group.get("bias_correction", True))),
            )
            for group in groups
        ]
        rate, decay, beta1, beta2, corrects = torch.tensor(settings, dtype=torch.float64).unbind(1)
        steps, group_of = self._counts.double(), self._group_of
        corrections = [
            torch.where(corrects[group_of] > 0, 1 - beta[group_of] ** steps, 1.0)
            for beta in (beta1, beta2)
        ]
        if self._torch_order:
            corrections[1] = corrections[1].sqrt()
        on_rate, on_decay = self._row_factors
        rates = [rate[self._row_group] * on_rate, decay[self._row_group] * on_decay]
        if self._projection is not None:
            # The update of a matrix with a hyperball step is u: rate 1, decay 0.
            is_plain = self._projection.is_plain
            rates = [torch.where(is_plain, rates[0], 1.0), torch.where(is_plain, rates[1], 0.0)]
        return torch.cat([*corrections, *rates]).float()
