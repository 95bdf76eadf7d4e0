"""Hyperball steps: a matrix keeps its Frobenius norm, and its learning rate is the relative step.

    W <- R N(W - eta m R N(u)),    N(x) = x / |x|_F,  N(0) = 0

u is the direction of the optimizer's own step (Adam: AdamH; Muon: MuonH), m the multiplier, R the
norm of the whole logical matrix when training began, eta the hyperball learning rate. There is no
weight decay. Source: arXiv 2606.29158, which recommends it; reference implementations are adamh.py
and muonh.py of marin-community/marin and `MuonHyperball` of Emerging-Optimizers, whose radius is
that of a tensor-parallel shard and changes from step to step.

Where one kernel steps all tensors of an Adam optimizer (`fused_hyperball`), u follows from the
moments. For every other optimizer u is what it leaves in a tensor that was zero before a step at
rate 1 (`projection`). In both, moments and counters advance as in any other step, and a scale
factor of the optimizer cancels in N(u).
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from megatron_llr.config import flag
from megatron_llr.matrices.ids import MatrixId
from megatron_llr.param_groups.fused_support import upload
from megatron_llr.param_groups.hyperball_norms import NormSums
from megatron_llr.param_groups.projection import (
    HyperballPart,
    HyperballTensor,
    Projection,
    projection_of,
)
from megatron_llr.param_groups.stepped_tensor import (
    MatrixRanges,
    Ranges,
    TensorMatrices,
    gaps,
)

DEFAULT_RATIO = 13 / 3
"""Default hyperball learning rate over `--lr` (marin's AdamH recipe: adamh_lr = 13/3 adam_lr)."""


class HyperballStep:
    """The hyperball step of the matrices of one inner optimizer.

    Args:
        optimizer: the inner optimizer.
        sums: sums over its matrices.
        tensors: the tensors that this rank steps, and the matrices in them with rows that pad the
            vocabulary; they follow the head.
        radii: matrix id -> R, for the matrices with a hyperball step.
        learning_rate: largest hyperball learning rate; None for `DEFAULT_RATIO` times the largest
            base learning rate.
        peak_rate: largest base learning rate of a param group over the training run.

    Attributes:
        matrices: the matrices with a hyperball step.
        sums: as given.
        tensors: id of a tensor with a hyperball step -> the tensor, and the elements of its
            matrices.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        sums: NormSums,
        tensors: Sequence[TensorMatrices],
        radii: Mapping[MatrixId, float],
        *,
        learning_rate: float | None,
        peak_rate: Callable[[Mapping[str, Any]], float],
    ) -> None:
        self._optimizer, self.sums = optimizer, sums
        self._learning_rate, self._peak_rate = learning_rate, peak_rate
        self.matrices = frozenset(m for m in sums.matrices if m in radii)
        self.tensors: dict[int, HyperballTensor] = {}
        for each, parts in tensors:
            if any(matrix in self.matrices for matrix, _ in parts):
                counted = sums.counted[id(each.tensor)]
                self.tensors[id(each.tensor)] = (
                    each.tensor,
                    _divided(each.tensor, parts, counted, sums.rows),
                )
        self._projection: Projection | None = None
        # A matrix without a hyperball step has radius 0 here and is never written.
        radius = [radii.get(matrix, 0.0) for matrix in sums.matrices]
        self._radii = torch.tensor(radius, dtype=torch.float64)
        self._radii_on_device = self._radii.to(sums.device)
        # Index of the param group of every matrix; the last has rate 0 and no element here.
        group_of = [len(optimizer.param_groups)] * len(sums.matrices)
        for index, group in enumerate(optimizer.param_groups):
            for tensor in self.tensors_of(group):
                for part in self.tensors[id(tensor)][1]:
                    group_of[part.row] = index
        self._group_of = torch.tensor(group_of, dtype=torch.int64)
        self._multipliers: Mapping[MatrixId, float] | None = None
        self._sums: torch.Tensor | None = None

    @property
    def cosines(self) -> torch.Tensor | None:
        """<W, u> / (|W| |u|) in the last step, [matrices of `sums`] fp64 on the device.

        NaN where a norm is 0. None before the first step.
        """
        if self._sums is None:
            return None
        weights, directions, products = self._sums
        cosines: torch.Tensor = products / (weights * directions).sqrt()
        return cosines

    def learning_rate(self, group: Mapping[str, Any]) -> float:
        """Hyperball learning rate of a param group: it follows the group's schedule."""
        rate = float(group["lr"])
        if self._learning_rate is None:
            return DEFAULT_RATIO * rate
        return self._learning_rate * rate / self._peak_rate(group)

    def tensors_of(self, group: Mapping[str, Any]) -> list[torch.Tensor]:
        """The tensors of a param group that have a hyperball step."""
        return [tensor for tensor in group["params"] if id(tensor) in self.tensors]

    @contextlib.contextmanager
    def project(self, multipliers: Mapping[MatrixId, float]) -> Iterator[None]:
        """Step the optimizer inside at rate 1 and weight decay 0; then project its matrices.

        Enter on all ranks that step a part of the optimizer's parameters: `moves` is called once.
        If the step raises, the weights are restored.

        Args:
            multipliers: of the matrices. Default 1.

        Raises:
            RuntimeError: if the fp32 weights are in the optimizer's state.
        """
        if self._projection is None:
            tensors = list(self.tensors.values())
            dtypes = {str(tensor.dtype) for tensor, _ in tensors} - {"torch.float32"}
            if dtypes:
                raise RuntimeError(
                    f"megatron_llr: {type(self._optimizer).__name__} keeps the fp32 weights of "
                    f"{' and '.join(sorted(dtypes))} tensors in its state, where only the fused "
                    "step can project them. This step cannot be fused: it has a closure, a "
                    "gradient scaler, or a gradient that is not contiguous fp32 or bf16. Leave out "
                    f"--use-precision-aware-optimizer or {flag('hyperball')}"
                )
            self._projection = projection_of(tensors, self.sums)
        projection = self._projection
        projection.begin()
        try:
            yield
        except BaseException:
            projection.restore()
            raise
        projection.finish(self.moves(multipliers, projection.local_sums()))

    def moves(
        self, multipliers: Mapping[MatrixId, float], local_sums: torch.Tensor
    ) -> torch.Tensor:
        """Of the new weights s (W - a u), s and a s: [2, matrices] fp64 on the device.

        One all-reduce for every process group that divides matrices. Call on all ranks that step a
        part of the optimizer's parameters. The CPU does not wait for the device.

        Args:
            multipliers: of the matrices, default 1. New multipliers must be a new mapping.
            local_sums: |W|^2, |u|^2 and <W, u> over the elements that this rank steps, [3,
                matrices] fp64; overwritten.
        """
        reach = self._reach(multipliers)
        self._sums = self.sums.reduce(local_sums)
        weights, directions, products = self._sums
        steps = torch.where(directions > 0, reach / directions.sqrt(), 0.0)
        # |W - a u|^2
        squares = weights - 2 * steps * products + steps.square() * directions
        norms = squares.clamp(min=0).sqrt()
        moved = (steps > 0) & (norms > 0)
        scales = torch.where(moved, self._radii_on_device / norms, 1.0)
        return torch.stack([scales, steps * scales])

    def _reach(self, multipliers: Mapping[MatrixId, float]) -> torch.Tensor:
        """Eta m R of every matrix, [matrices] fp64 on the device; 0 without an element here."""
        if self._multipliers is not multipliers:
            self._multipliers = multipliers
            values = [multipliers.get(matrix, 1.0) for matrix in self.sums.matrices]
            self._distances = torch.tensor(values, dtype=torch.float64) * self._radii
        rates = [self.learning_rate(group) for group in self._optimizer.param_groups]
        by_group = torch.tensor([*rates, 0.0], dtype=torch.float64)
        return upload(by_group[self._group_of] * self._distances, self.sums.device)


def _divided(
    tensor: torch.Tensor,
    parts: Sequence[MatrixRanges],
    counted: Mapping[MatrixId, Ranges],
    rows: Mapping[MatrixId, int],
) -> tuple[HyperballPart, ...]:
    """The elements of the matrices in a tensor, apart from those that pad the vocabulary."""
    if len(parts) > 1:
        return tuple(HyperballPart(rows[matrix], ranges, ()) for matrix, ranges in parts)
    # A tensor of one matrix is that matrix as a whole, padding included.
    matrix, _ = parts[0]
    own = counted[matrix]
    return (HyperballPart(rows[matrix], own, gaps(own, tensor.numel())),)
