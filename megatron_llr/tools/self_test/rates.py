"""The learning rate of every element, computed from what an optimizer's step changed."""

from collections.abc import Sequence
from typing import Any

import torch

from megatron_llr.megatron.repeated_runs import TrainingRun
from megatron_llr.megatron.stepped_elements import SteppedElements, stepped_elements

# An fp32 weight holds an update of 1e-3 to within about 1e-4 of it. Elements that move less than
# this part of the base learning rate hold it less accurately, and are left out.
_LEAST_MOVE = 0.05
_EACH, _MEDIAN = 2e-2, 5e-3


def _solved(each: SteppedElements, before: torch.Tensor) -> torch.Tensor:
    """Learning rate of every element of a tensor that AdamW stepped, in fp64.

    after = before - rate * (weight_decay * before + m / (sqrt(v) + eps)), m and v without bias
    (Loshchilov and Hutter, arXiv 1711.05101, algorithm 2).
    """
    group = _group(each)
    state = each.optimizer.state[each.tensor]
    # Transformer Engine's and apex's FusedAdam count steps per group, torch's AdamW per tensor.
    step = float(group["step"] if "step" in group else state["step"])
    beta1, beta2 = group["betas"]
    m = state["exp_avg"].double() / (1 - beta1**step)
    v = state["exp_avg_sq"].double() / (1 - beta2**step)
    start = before.double()
    direction = group["weight_decay"] * start + m / (v.sqrt() + group["eps"])
    rates: torch.Tensor = (start - each.tensor.detach().double()) / direction
    return rates.view(-1)


def _group(each: SteppedElements) -> dict[str, Any]:
    group: dict[str, Any] = next(
        group
        for group in each.optimizer.param_groups
        if any(parameter is each.tensor for parameter in group["params"])
    )
    return group


class RateCheck:
    """Compares, at some updates, the rate of every element with base learning rate x multiplier.

    Args:
        updates: numbers of the updates.

    Attributes:
        worst: largest relative deviation of an element.
        failures: a line per matrix and update that deviates.
        compared: elements that were compared.
        elements: elements that this rank steps at those updates.
    """

    def __init__(self, updates: Sequence[int]) -> None:
        self._updates = updates
        self._before: dict[int, torch.Tensor] = {}
        self._expected: dict[tuple[int, str | None], tuple[float, float]] = {}
        self.worst, self.compared, self.elements = 0.0, 0, 0
        self.failures: list[str] = []

    def __call__(self, run: TrainingRun, update: int, done: bool) -> None:
        """Call before and after every update."""
        if update not in self._updates:
            return
        elements = list(stepped_elements(run.model, run.optimizer))
        if done:
            for each in elements:
                self._compare(each, update)
            self._before.clear()
            return
        multipliers = {str(matrix): m for matrix, m in run.controller.multipliers.items()}
        for each in elements:
            base = float(_group(each)["lr"])
            multiplier = multipliers[each.matrix] if each.matrix else 1.0
            self._expected[id(each.tensor), each.matrix] = base, base * multiplier
            if id(each.tensor) not in self._before:
                self._before[id(each.tensor)] = each.tensor.detach().clone()

    def _compare(self, each: SteppedElements, update: int) -> None:
        base, expected = self._expected[id(each.tensor), each.matrix]
        before = self._before[id(each.tensor)]
        moved = (each.tensor.detach() - before).abs().view(-1) > _LEAST_MOVE * base
        rates = _solved(each, before)[each.mask & moved]
        self.elements += int(each.mask.sum())
        self.compared += rates.numel()
        if rates.numel() == 0:
            return
        deviation = (rates / expected - 1).abs()
        # Not max() of Python: NaN must count.
        largest, median = float(deviation.max()), abs(float(rates.median()) / expected - 1)
        self.worst = max(self.worst, largest)
        if not (largest <= _EACH and median <= _MEDIAN):
            self.failures.append(
                f"{each.matrix or 'elements of no matrix'}, update {update}: learning rate "
                f"{float(rates.median()):.4g} (median), expected {expected:.4g}"
            )
