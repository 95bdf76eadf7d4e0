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
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_llr.matrices.ids import EMBEDDING_IDS, ROUTER, MatrixId
from megatron_llr.matrices.shard import MatrixShard
from megatron_llr.param_groups.square_sums import SquareSums
from megatron_llr.param_groups.stepped_tensor import TensorMatrices
from megatron_llr.param_groups.views import Window, windows

DEFAULT_RATIO = 13 / 3
"""Default hyperball learning rate over `--lr` (marin's AdamH recipe: adamh_lr = 13/3 adam_lr)."""

_HEAD = "head"
_SHARED_EXPERT_GATE = "shared.mix"


def reason_for_plain_step(matrix: MatrixId) -> str | None:
    """Why a matrix has no hyperball step by its role; None if it has one.

    As in the reference, the head has one and embeddings have none. A router, and the gate of shared
    experts, decide which experts are used by the size of their weights.
    """
    if matrix in EMBEDDING_IDS and matrix != _HEAD:
        return "an embedding"
    if matrix.role == ROUTER:
        return "a router"
    if matrix.role == _SHARED_EXPERT_GATE:
        return "the gate of shared experts"
    return None


@dataclass(frozen=True)
class SteppedDomain:
    """The parameters that one inner optimizer steps, and how they are divided.

    Attributes:
        parameters: all of them, also those of which this rank steps no element.
        group: process group that the distributed optimizer divides them over; None without it.
        peak_rate: largest base learning rate of a param group over the training run.
    """

    parameters: Sequence[torch.nn.Parameter]
    group: Any
    peak_rate: Callable[[Mapping[str, Any]], float]


@dataclass(frozen=True)
class _Reduction:
    """Matrices whose elements are divided over the same process groups.

    Attributes:
        rows: indices of the matrices.
        groups: process groups of more than one rank; sums are reduced over one after the other.
    """

    rows: torch.Tensor
    groups: tuple[Any, ...]


class NormSums:
    """Sums over whole logical matrices of what the ranks of one inner optimizer hold.

    Every rank that steps a part of the parameters must enter a reduction in the same order, also
    if it holds no element.

    Args:
        domain: the parameters of the optimizer.
        shards: catalog of this rank without rows that pad the vocabulary.
        tensors: the tensors that this rank steps, and the matrices in them without padding.

    Attributes:
        matrices: the matrices of the optimizer that may have a hyperball step, sorted.
    """

    def __init__(
        self,
        domain: SteppedDomain,
        shards: Sequence[MatrixShard],
        tensors: Sequence[TensorMatrices],
    ) -> None:
        stepped = {id(parameter) for parameter in domain.parameters}
        held = {
            shard.matrix: shard
            for shard in shards
            if id(shard.parameter) in stepped
            and not shard.copy
            and reason_for_plain_step(shard.matrix) is None
        }
        self.matrices: list[MatrixId] = sorted(held)
        self.rows = {matrix: row for row, matrix in enumerate(self.matrices)}
        by_groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
        groups_of: dict[tuple[int, ...], tuple[Any, ...]] = {}
        for matrix, row in self.rows.items():
            shard = held[matrix]
            groups = tuple(
                group
                for group, size in (
                    (
                        domain.group,
                        1 if domain.group is None else dist.get_world_size(domain.group),
                    ),
                    (shard.group, len(shard.ranks)),
                )
                if size > 1
            )
            key = tuple(id(group) for group in groups)
            by_groups[key].append(row)
            groups_of[key] = groups
        self._reductions = [
            _Reduction(torch.tensor(rows), groups_of[key])
            for key, rows in sorted(by_groups.items(), key=lambda item: item[1][0])
            if groups_of[key]
        ]
        self.device = shards[0].parameter.device if shards else torch.device("cpu")
        self._tensors = [
            (each.tensor, tuple(part for part in parts if part[0] in self.rows))
            for each, parts in tensors
        ]
        self._squares = SquareSums(self._tensors, self.rows)
        numel = torch.tensor(
            [held[m].rows * held[m].columns for m in self.matrices], dtype=torch.float64
        )
        self._numel = numel.to(self.device)
        self._replicas: torch.Tensor | None = None

    def squares(self) -> torch.Tensor:
        """Sum of squares of the elements that this rank steps, per matrix: [matrices] fp64."""
        return self._squares.of_tensors(self.device)

    def reduce(self, table: torch.Tensor) -> torch.Tensor:
        """Sums over the whole matrices: [k, matrices] fp64, each element counted once.

        Args:
            table: this rank's sums, [k, matrices] fp64.
        """
        if self._replicas is None:
            counts = torch.zeros(1, len(self.matrices), dtype=torch.float64)
            for _, parts in self._tensors:
                for matrix, ranges in parts:
                    counts[0, self.rows[matrix]] += sum(last - first for first, last in ranges)
            # Ranks that duplicate a matrix bring equal shares.
            self._replicas = self._reduced(counts.to(self.device)) / self._numel
        return self._reduced(table) / self._replicas

    def _reduced(self, table: torch.Tensor) -> torch.Tensor:
        for reduction in self._reductions:
            rows = reduction.rows.to(table.device)
            part = table[:, rows].contiguous()
            for group in reduction.groups:
                dist.all_reduce(part, group=group)
            table[:, rows] = part
        return table

    def norms(self) -> dict[MatrixId, float]:
        """Frobenius norms of the whole matrices now. Enter on all ranks of the optimizer."""
        if not self.matrices:
            return {}
        squares = self.reduce(self.squares().unsqueeze(0))[0]
        return dict(zip(self.matrices, squares.sqrt().tolist(), strict=True))


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
