"""Norms of weights, base learning rates and changes by a step, for the log."""

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_llr.matrices.ids import MatrixId
from megatron_llr.param_groups.inner_groups import InnerGroups
from megatron_llr.param_groups.square_sums import SquareSums
from megatron_llr.param_groups.stepped_tensor import TensorMatrices


@dataclass(frozen=True, slots=True)
class MatrixSums:
    """Sums per matrix over the elements that a rank steps, in the order of the matrices.

    Replicas contribute equal shares. The sums over all ranks, divided by the total number of
    elements, are therefore exact for any sharding and replication.

    Attributes:
        table: [6, matrices] fp64, to be summed over all ranks. Its rows are the properties below.
    """

    table: torch.Tensor

    @classmethod
    def zeros(cls, matrices: int) -> "MatrixSums":
        """Sums over no elements, on the CPU."""
        return cls(torch.zeros(6, matrices, dtype=torch.float64))

    @property
    def squares(self) -> torch.Tensor:
        """Sum of squares of the stepped tensors."""
        return self.table[0]

    @property
    def elements(self) -> torch.Tensor:
        """Number of elements."""
        return self.table[1]

    @property
    def weighted_rates(self) -> torch.Tensor:
        """Base learning rate of the last step, summed over all elements."""
        return self.table[2]

    @property
    def changes(self) -> torch.Tensor:
        """Sum of squared changes by the last step, where it was recorded."""
        return self.table[3]

    @property
    def recorded(self) -> torch.Tensor:
        """Number of elements whose change was recorded."""
        return self.table[4]

    @property
    def weighted_cosines(self) -> torch.Tensor:
        """Sum over all elements of the cosine between weights and direction in the last hyperball
        step.
        """
        return self.table[5]

    def ratios(self, numel: Sequence[int]) -> Iterator[list[Any]]:
        """Norms, rates and relative updates of every matrix, from sums over the whole job.

        Args:
            numel: number of elements of the whole matrices.

        Yields:
            Frobenius norms (0 if no rank steps the matrix), base learning rates of the last step
            (NaN if unknown), the norms of its changes divided by those of the weights (None if a
            part was not recorded), and the cosines of the last hyperball step (None without one).
        """
        whole = torch.tensor(numel, dtype=torch.float64)
        norms = (self.squares * whole / self.elements).sqrt()
        yield torch.where(self.elements > 0, norms, 0.0).tolist()
        yield (self.weighted_rates / self.elements).tolist()
        known = (self.elements > 0) & (self.recorded == self.elements) & (self.squares != 0)
        pairs = zip(known.tolist(), (self.changes / self.squares).sqrt().tolist(), strict=True)
        yield [ratio if recorded else None for recorded, ratio in pairs]
        cosines = self.weighted_cosines / self.elements
        stepped = (self.weighted_cosines != 0) & cosines.isfinite()
        pairs = zip(stepped.tolist(), cosines.tolist(), strict=True)
        yield [cosine if has_one else None for has_one, cosine in pairs]


class StepRecorder:
    """Records the steps of all inner optimizers on a rank. Steps that are not logged have no cost.

    Args:
        sources: every inner optimizer, with its stepped tensors and the ranges to record.
        matrices: ids, in the order of the results.
        device: of the results.
        updates: whether the changes by a logged step are recorded. A copy of the tensors then
            exists during that step.
        batched: False for one norm per window on CUDA too.
    """

    def __init__(
        self,
        sources: Sequence[tuple[InnerGroups, Sequence[TensorMatrices]]],
        matrices: Sequence[MatrixId],
        device: torch.device,
        *,
        updates: bool,
        batched: bool = True,
    ) -> None:
        rows = self._rows = {matrix: row for row, matrix in enumerate(matrices)}
        self._device = device
        self._known = MatrixSums.zeros(len(rows))
        every = [(each.tensor, parts) for _, tensors in sources for each, parts in tensors]
        self._squares = SquareSums(every, rows, batched=batched)
        self._base_rates = [_BaseRates(inner, tensors, rows) for inner, tensors in sources]
        self._updates: list[_UpdateRecorder] = []
        self._elements: list[tuple[InnerGroups, torch.Tensor]] = []
        for (inner, tensors), rates in zip(sources, self._base_rates, strict=True):
            elements = rates.elements_by_row(len(rows))
            self._known.elements.add_(elements)
            self._elements.append((inner, elements))
            if updates:
                own = [(each.tensor, parts) for each, parts in tensors]
                single = len(sources) == 1
                squares = self._squares if single else SquareSums(own, rows, batched=batched)
                recorder = _UpdateRecorder(squares, elements, device)
                inner.around_step = recorder.around_step
                self._updates.append(recorder)

    def arm(self, *, record: bool) -> None:
        """Set whether the next step is recorded."""
        for recorder in self._updates:
            recorder.armed = record

    def local_sums(self) -> MatrixSums:
        """Sums of this rank after a step, on the device, to be summed over the job."""
        known = MatrixSums(self._known.table.clone())
        for rates in self._base_rates:
            rates.add_to(known.weighted_rates)
        changes = []
        for recorder in self._updates:
            change = recorder.take()
            if change is not None:
                changes.append(change)
                known.recorded.add_(recorder.elements)
        sums = MatrixSums(known.table.to(self._device, non_blocking=True))
        sums.squares.copy_(self._squares.of_tensors(self._device))
        for change in changes:
            sums.changes.add_(change)
        for inner, elements in self._elements:
            if inner.hyperball is not None and inner.hyperball.cosines is not None:
                matrices = inner.hyperball.sums.matrices
                rows = torch.tensor([self._rows[matrix] for matrix in matrices])
                cosines = inner.hyperball.cosines * elements[rows].to(self._device)
                sums.weighted_cosines.index_add_(0, rows.to(self._device), cosines)
        return sums


class _BaseRates:
    """Base learning rates of the last step of an inner optimizer, per matrix."""

    def __init__(
        self, inner: InnerGroups, tensors: Sequence[TensorMatrices], rows: dict[MatrixId, int]
    ) -> None:
        parts = [(id(each.tensor), matrix, ranges) for each, ps in tensors for matrix, ranges in ps]
        counts = [sum(last - first for first, last in ranges) for _, _, ranges in parts]
        self._rows = torch.tensor([rows[matrix] for _, matrix, _ in parts], dtype=torch.int64)
        self._elements = torch.tensor(counts, dtype=torch.float64)
        self._inner = inner
        self._tensors = [tensor for tensor, _, _ in parts]
        self._grouped: list[list[int]] | None = None

    def elements_by_row(self, rows: int) -> torch.Tensor:
        """Number of elements of every matrix on this rank: [rows] fp64."""
        return torch.zeros(rows, dtype=torch.float64).index_add_(0, self._rows, self._elements)

    def add_to(self, weighted: torch.Tensor) -> None:
        """Add number of elements times rate for every matrix; NaN before the first step."""
        rates = self._inner.base_rates
        grouped = [[id(tensor) for tensor in tensors] for _, tensors in rates]
        if grouped != self._grouped:
            self._grouped = grouped
            group_of = {tensor: n for n, tensors in enumerate(grouped) for tensor in tensors}
            # The last index is for tensors in no group. Their rate is NaN.
            indices = [group_of.get(tensor, len(grouped)) for tensor in self._tensors]
            self._group_of = torch.tensor(indices, dtype=torch.int64)
        values = torch.tensor([*(float(r) for r, _ in rates), math.nan], dtype=torch.float64)
        weighted.index_add_(0, self._rows, self._elements * values[self._group_of])


class _UpdateRecorder:
    """Squared norm of the change by one step of an inner optimizer, per matrix.

    Attributes:
        armed: whether the next step is recorded.
        elements: number of recorded elements per matrix, [matrices] fp64 on the CPU.
    """

    def __init__(self, squares: SquareSums, elements: torch.Tensor, device: torch.device) -> None:
        self.armed = False
        self.elements = elements
        self._squares, self._device = squares, device
        self._changes: torch.Tensor | None = None

    @contextlib.contextmanager
    def around_step(self) -> Iterator[None]:
        """Record the step inside if armed. A step that raises is not recorded."""
        self._changes = None
        if not self.armed:
            yield
            return
        before = self._squares.snapshot()
        yield
        self._changes = self._squares.of_changes(before, self._device)

    def take(self) -> torch.Tensor | None:
        """Squared changes by the last step, [matrices] fp64, only once; None if not recorded."""
        changes, self._changes = self._changes, None
        return changes
