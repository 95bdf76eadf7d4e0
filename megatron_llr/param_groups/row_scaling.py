"""Different rates inside one tensor, for optimizers that update its parts apart but step it whole.

Muon orthogonalises q, k and v of a fused weight each by itself, if asked to, and then steps the
tensor with one learning rate. Between the two it calls `pre_weight_update_fn_inplace`
(OrthogonalizedOptimizer of emerging-optimizers), and there the update of every part is scaled. A
part decays as a parameter of its own would: the optimizer's weight decay is applied to it with its
own factors.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from megatron_llr.param_groups.views import Part

Factors = Callable[[float], tuple[float, float]]
"""Multiplier -> factors on the learning rate and on the weight decay."""


@dataclass(frozen=True, slots=True)
class _Rows:
    """A run of rows of a tensor, with the factors of its matrix."""

    first: int
    last: int
    on_rate: float
    on_decay: float


class RowScaling:
    """Scales the updates of parts while an optimizer steps; does nothing to other tensors.

    Args:
        optimizer: the inner optimizer; two of its methods get a wrapper on this instance.
        factors: what a multiplier means.
    """

    def __init__(self, optimizer: Any, factors: Factors) -> None:
        self._optimizer = optimizer
        self._factors = factors
        self._rows: dict[int, list[_Rows]] = {}
        self._installed = False

    @property
    def is_possible(self) -> bool:
        """Whether the optimizer has the two methods between which updates are scaled."""
        return all(
            callable(getattr(self._optimizer, method, None))
            for method in ("pre_weight_update_fn_inplace", "_apply_weight_decay_inplace")
        )

    def scale(
        self, tensor: torch.Tensor, parts: tuple[Part, ...], multipliers: Mapping[str, float]
    ) -> None:
        """Give the parts of a tensor their multipliers until `clear`.

        Args:
            tensor: [rows, columns], as it stands in the optimizer's groups.
            parts: the matrices in it; their ranges are whole rows.
            multipliers: of each of them; 1 where not named.
        """
        if not self._installed:
            self._install()
        columns = tensor.shape[1]
        self._rows[id(tensor)] = [
            _Rows(first // columns, last // columns, *self._factors(multipliers.get(matrix, 1.0)))
            for matrix, ranges in parts
            for first, last in ranges
        ]

    def clear(self) -> None:
        """Forget all multipliers."""
        self._rows.clear()

    def _install(self) -> None:
        self._installed = True
        decay = self._optimizer._apply_weight_decay_inplace
        before_update = self._optimizer.pre_weight_update_fn_inplace

        def apply_weight_decay(
            tensor: torch.Tensor, gradient: torch.Tensor, rate: float, weight_decay: float
        ) -> None:
            rows = self._rows.get(id(tensor))
            if rows is None:
                decay(tensor, gradient, rate, weight_decay)
                return
            for run in rows:
                part = slice(run.first, run.last)
                factors = rate * run.on_rate, weight_decay * run.on_decay
                decay(tensor[part], gradient[part], *factors)

        def before_weight_update(tensor: torch.Tensor, update: torch.Tensor) -> None:
            before_update(tensor, update)
            for run in self._rows.get(id(tensor), ()):
                update[run.first : run.last].mul_(run.on_rate)

        self._optimizer._apply_weight_decay_inplace = apply_weight_decay
        self._optimizer.pre_weight_update_fn_inplace = before_weight_update
