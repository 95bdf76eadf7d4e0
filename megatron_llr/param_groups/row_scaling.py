"""Different rates in one tensor, for optimizers that update its matrices separately (Muon).

Muon can orthogonalize q, k and v of a fused weight separately, and then steps the tensor with one
learning rate. Before that step it calls `pre_weight_update_fn_inplace` (OrthogonalizedOptimizer of
emerging-optimizers), in which the update of every matrix is scaled. The optimizer's weight decay is
also applied to each matrix separately, with the factors of its multiplier.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from megatron_llr.matrices.ids import MatrixId
from megatron_llr.param_groups.stepped_tensor import Factors, MatrixRanges


@dataclass(frozen=True, slots=True)
class _RowFactors:
    """A run of rows of a tensor, and the factors of its matrix."""

    first: int
    last: int
    on_rate: float
    on_decay: float


class RowScaling:
    """Scales the updates of rows of selected tensors while an optimizer steps.

    Args:
        optimizer: the inner optimizer. Two methods of this instance are wrapped.
        factors: factors on learning rate and weight decay of a matrix for a multiplier.
    """

    def __init__(self, optimizer: Any, factors: Factors) -> None:
        self._optimizer = optimizer
        self._factors = factors
        self._rows: dict[int, list[_RowFactors]] = {}
        self._installed = False

    @property
    def is_possible(self) -> bool:
        """Whether the optimizer has the two methods that are wrapped."""
        return all(
            callable(getattr(self._optimizer, method, None))
            for method in ("pre_weight_update_fn_inplace", "_apply_weight_decay_inplace")
        )

    def scale(
        self,
        tensor: torch.Tensor,
        parts: tuple[MatrixRanges, ...],
        multipliers: Mapping[MatrixId, float],
    ) -> None:
        """Scale the matrices in a tensor by their multipliers until `clear`.

        Args:
            tensor: [rows, columns], tensor in the optimizer's groups.
            parts: the matrices in it. Their ranges are whole rows.
            multipliers: of the matrices. Default 1.
        """
        if not self._installed:
            self._install()
        columns = tensor.shape[1]
        self._rows[id(tensor)] = [
            _RowFactors(
                first // columns,
                last // columns,
                *self._factors(matrix, multipliers.get(matrix, 1.0)),
            )
            for matrix, ranges in parts
            for first, last in ranges
        ]

    def clear(self) -> None:
        """Stop scaling."""
        self._rows.clear()

    def _install(self) -> None:
        """Wrap the optimizer's methods."""
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
                row_slice = slice(run.first, run.last)
                scaled = rate * run.on_rate, weight_decay * run.on_decay
                decay(tensor[row_slice], gradient[row_slice], *scaled)

        def before_weight_update(tensor: torch.Tensor, update: torch.Tensor) -> None:
            before_update(tensor, update)
            for run in self._rows.get(id(tensor), ()):
                update[run.first : run.last].mul_(run.on_rate)

        self._optimizer._apply_weight_decay_inplace = apply_weight_decay
        self._optimizer.pre_weight_update_fn_inplace = before_weight_update
