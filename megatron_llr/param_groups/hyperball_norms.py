"""Norms of whole logical matrices while training: what hyperball steps keep, and which ones do."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_llr.matrices.ids import EMBEDDING_IDS, ROUTER, MatrixId
from megatron_llr.matrices.info import MatrixIndex
from megatron_llr.matrices.shard import MatrixShard
from megatron_llr.output import and_more
from megatron_llr.param_groups.square_sums import SquareSums
from megatron_llr.param_groups.stepped_tensor import TensorMatrices
from megatron_llr.ranks import gather_distinct

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
        rows: indices of the matrices, on the device of the sums.
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
        rows: matrix id -> index in `matrices`.
        device: of the sums.
        counted: id of a tensor -> matrix id -> ranges of its elements without padding.
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
        self.device = shards[0].parameter.device if shards else torch.device("cpu")
        self._reductions = [
            _Reduction(torch.tensor(rows, device=self.device), groups_of[key])
            for key, rows in sorted(by_groups.items(), key=lambda item: item[1][0])
            if groups_of[key]
        ]
        self._tensors = [
            (each.tensor, tuple(part for part in parts if part[0] in self.rows))
            for each, parts in tensors
        ]
        self.counted = {id(tensor): dict(parts) for tensor, parts in self._tensors}
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
            part = table[:, reduction.rows].contiguous()
            for group in reduction.groups:
                dist.all_reduce(part, group=group)
            table[:, reduction.rows] = part
        return table

    def norms(self) -> dict[MatrixId, float]:
        """Frobenius norms of the whole matrices now. Enter on all ranks of the optimizer."""
        if not self.matrices:
            return {}
        squares = self.reduce(self.squares().unsqueeze(0))[0]
        return dict(zip(self.matrices, squares.sqrt().tolist(), strict=True))


def shared_norms(
    own: Mapping[MatrixId, float], saved: Mapping[str, float]
) -> dict[MatrixId, float]:
    """Norms on every rank: the saved ones, otherwise those of the ranks. Enter on all ranks.

    Args:
        own: of the matrices in this rank's optimizers.
        saved: matrix id -> norm in a state document.

    Returns:
        Matrix id -> norm, in the order of the model.
    """
    norms: dict[MatrixId, float] = {}
    for reported in gather_distinct({str(matrix): norm for matrix, norm in own.items()}):
        for name, norm in reported.items():
            norms.setdefault(MatrixId.read(name), saved.get(name, norm))
    return {matrix: norms[matrix] for matrix in sorted(norms)}


def plain_matrices(
    norms: Mapping[MatrixId, float], matrix_index: MatrixIndex
) -> dict[MatrixId, str]:
    """The matrices without a hyperball step, and why.

    A step from a norm of 0 would divide by it. A parameter is stepped as a whole, so the matrices
    fused with such a matrix have no hyperball step either.
    """
    zero = {matrix_index[matrix].parameter_id for matrix, norm in norms.items() if norm == 0}
    plain: dict[MatrixId, str] = {}
    for matrix, info in matrix_index.items():
        if matrix not in norms:
            plain[matrix] = reason_for_plain_step(matrix) or "no optimizer steps it"
        elif info.parameter_id in zero:
            plain[matrix] = "zero at the start, itself or a matrix of its parameter"
    return plain


def start_lines(
    count: int, plain: Mapping[MatrixId, str], learning_rate: float | None, unsaved: int | None
) -> list[str]:
    """Log lines of a run that starts hyperball steps.

    Args:
        count: number of matrices with a hyperball step.
        plain: the others, and why.
        learning_rate: as in the settings.
        unsaved: number of the next update if the norms were not in a checkpoint.
    """
    rate = "13/3 of --lr" if learning_rate is None else f"{learning_rate:g}"
    names = and_more([f"{matrix} ({why})" for matrix, why in plain.items()], 8) or "none"
    lines = [f"hyperball: {count} matrices keep their norm, learning rate {rate}; plain: {names}"]
    if unsaved is not None and unsaved > 1:
        lines.append(
            f"hyperball: the checkpoint has no norms, so those before update {unsaved} are kept"
        )
    return lines
