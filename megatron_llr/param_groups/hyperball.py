"""Hyperball steps: a matrix keeps its Frobenius norm, and its learning rate is the relative step.

    W <- R N(W - eta m R N(u)),    N(x) = x / |x|_F,  N(0) = 0

u is the direction of the optimizer's own step (Adam: AdamH; Muon: MuonH), m the multiplier, R the
norm of the whole logical matrix when training began, eta the hyperball learning rate. There is no
weight decay. Source: arXiv 2606.29158, which recommends it; reference implementations are adamh.py
and muonh.py of marin-community/marin and `MuonHyperball` of Emerging-Optimizers, whose radius is
that of a tensor-parallel shard and changes from step to step.

u is what the optimizer leaves in a tensor that was zero before a step at rate 1: its moments and
counters advance as in any other step, and a scale factor of its own cancels in N(u).
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from megatron_llr.matrices.ids import MatrixId
from megatron_llr.param_groups.hyperball_norms import NormSums
from megatron_llr.param_groups.stepped_tensor import TensorMatrices
from megatron_llr.param_groups.views import Window, windows

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
        cosines: <W, u> / (|W| |u|) of the last step, [matrices of `sums`] fp64; NaN where a norm
            is 0, None before the first.
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
        # A matrix without a hyperball step has radius 0 here and is never written.
        self._radii = torch.tensor(
            [radii.get(matrix, 0.0) for matrix in sums.matrices], dtype=torch.float64
        ).to(sums.device)
        self._parts: list[tuple[torch.Tensor, list[tuple[int, list[Window]]]]] = []
        for each, parts in tensors:
            if not any(matrix in self.matrices for matrix, _ in parts):
                continue
            if each.tensor.dtype != torch.float32:
                raise TypeError(
                    f"a hyperball step needs fp32 weights in the optimizer; those of "
                    f"{parts[0][0]} are {each.tensor.dtype}"
                )
            # A tensor of one matrix is that matrix as a whole, padding included.
            whole = [(parts[0][0], ((0, each.tensor.numel()),))] if len(parts) == 1 else parts
            windowed = [(sums.rows[m], windows(ranges, strided=True)) for m, ranges in whole]
            self._parts.append((each.tensor, windowed))
        self.tensor_ids = {id(tensor) for tensor, _ in self._parts}
        self.cosines: torch.Tensor | None = None

    def learning_rate(self, group: Mapping[str, Any]) -> float:
        """Hyperball learning rate of a param group: it follows the group's schedule."""
        rate = float(group["lr"])
        if self._learning_rate is None:
            return DEFAULT_RATIO * rate
        return self._learning_rate * rate / self._peak_rate(group)

    def tensors_of(self, group: Mapping[str, Any]) -> list[torch.Tensor]:
        """The tensors of a param group that have a hyperball step."""
        return [tensor for tensor in group["params"] if id(tensor) in self.tensor_ids]

    @contextlib.contextmanager
    def project(self, multipliers: Mapping[MatrixId, float]) -> Iterator[None]:
        """Step the optimizer inside at rate 1 and weight decay 0; then project its matrices.

        Enter on all ranks that step a part of the optimizer's parameters: one all-reduce for every
        process group that divides matrices. If the step raises, the weights are restored.

        Args:
            multipliers: of the matrices. Default 1.
        """
        tensors = [tensor.detach() for tensor, _ in self._parts]
        rates = self._rates(multipliers)
        weights = self.sums.squares()
        saved = [tensor.clone() for tensor in tensors]
        if tensors:
            torch._foreach_zero_(tensors)
        try:
            yield
        except BaseException:
            for tensor, before in zip(tensors, saved, strict=True):
                tensor.copy_(before)
            raise
        directions = self.sums.squares()
        # W - u. Its square gives <W, u>, and W - a u = (1 - a) W + a (W - u).
        if tensors:
            torch._foreach_add_(tensors, saved)
        table = torch.stack([weights, directions, self.sums.squares()])
        weights, directions, differences = self.sums.reduce(table)
        products = (weights + directions - differences) / 2
        steps = rates * self._radii / directions.sqrt()
        steps = torch.where(directions > 0, steps, 0.0)
        norms = (weights - 2 * steps * products + steps.square() * directions).clamp(min=0).sqrt()
        moved = (steps > 0) & (norms > 0)
        scales = torch.where(moved, self._radii / norms, 1.0)
        self.cosines = products / (weights * directions).sqrt()
        self._write(tensors, saved, steps, scales)

    def _rates(self, multipliers: Mapping[MatrixId, float]) -> torch.Tensor:
        """Eta m of every matrix, [matrices] fp64 on the device; 0 without an element here."""
        rates = dict.fromkeys(self.sums.matrices, 0.0)
        group_of = {
            id(tensor): group
            for group in self._optimizer.param_groups
            for tensor in self.tensors_of(group)
        }
        names = self.sums.matrices
        for tensor, parts in self._parts:
            rate = self.learning_rate(group_of[id(tensor)])
            for row, _ in parts:
                rates[names[row]] = rate * multipliers.get(names[row], 1.0)
        values = torch.tensor(list(rates.values()), dtype=torch.float64)
        return values.to(self.sums.device, non_blocking=True)

    def _write(
        self,
        tensors: Sequence[torch.Tensor],
        saved: Sequence[torch.Tensor],
        steps: torch.Tensor,
        scales: torch.Tensor,
    ) -> None:
        """Weights (1 - a) W + a (W - u), scaled to the radius, in place of W - u."""
        kept, taken = ((1 - steps) * scales).float(), (steps * scales).float()
        for tensor, before, (_, parts) in zip(tensors, saved, self._parts, strict=True):
            new, old = tensor.view(-1), before.view(-1)
            for row, covering in parts:
                for window in covering:
                    window.of(new).mul_(taken[row]).add_(window.of(old).mul_(kept[row]))
