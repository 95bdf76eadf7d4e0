"""What an optimizer steps instead of its own groups, prepared once and kept while it holds.

Which tensors and views share a group depends on which multipliers are equal, not on their values:
in a ramp they all move, and the plan stands.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_llr.matrices.layout import join_ranges
from megatron_llr.param_groups.stepped_tensor import SteppedTensor
from megatron_llr.param_groups.views import FusedTensor, Part

AT_ONE = 0
"""Number of those whose multiplier is 1."""

Show = Callable[[torch.Tensor, tuple[Part, ...]], FusedTensor]
"""Views of a tensor, one set for each part."""


def equal_multipliers(matrices: Iterable[str], multipliers: Mapping[str, float]) -> dict[str, int]:
    """Matrix id -> a number that it shares with those of the same multiplier; 1 where not named."""
    numbers: dict[float, int] = {1.0: AT_ONE}
    return {
        matrix: numbers.setdefault(multipliers.get(matrix, 1.0), len(numbers))
        for matrix in matrices
    }


def join_parts(parts: Sequence[Part], numbers: Mapping[str, int]) -> dict[int, Part]:
    """Number -> the part that all matrices of that number make together, under the first's id.

    Ranges that touch become one, so that equal experts side by side need one view.
    """
    members: dict[int, list[Part]] = defaultdict(list)
    for part in parts:
        members[numbers[part[0]]].append(part)
    return {number: _joined(found) for number, found in members.items()}


def _joined(parts: list[Part]) -> Part:
    if len(parts) == 1:
        return parts[0]
    return parts[0][0], join_ranges(sorted(run for _, found in parts for run in found))


@dataclass(frozen=True, slots=True)
class _Piece:
    """A group in place of a part of one: its number, its tensors, and the dict to fill."""

    number: int
    tensors: list[torch.Tensor]
    group: dict[str, Any]


class StepPlan:
    """The pieces of every group of an optimizer.

    Args:
        groups: the optimizer's own groups.
        parts: id of a stepped tensor -> the tensor and the matrices in it.
        numbers: as `equal_multipliers` gives them.
        show: makes the views of a tensor; None if the optimizer takes none.

    Attributes:
        fused: tensors shown as views.
        views: ids of all views.
        scaled: tensors that stay whole though their matrices' multipliers differ.
    """

    def __init__(
        self,
        groups: Sequence[Mapping[str, Any]],
        parts: Mapping[int, tuple[SteppedTensor, tuple[Part, ...]]],
        numbers: Mapping[str, int],
        show: Show | None,
    ) -> None:
        self.fused: list[FusedTensor] = []
        self.scaled: list[tuple[torch.Tensor, tuple[Part, ...]]] = []
        self._numbers = numbers
        self._matrix_of = {number: matrix for matrix, number in numbers.items()}
        self._params = [list(group["params"]) for group in groups]
        self._pieces = [self._cut(params, parts, show) for params in self._params]
        self.views = {id(view) for f in self.fused for vs in f.views.values() for view in vs}

    def _cut(
        self,
        params: Sequence[torch.Tensor],
        all_parts: Mapping[int, tuple[SteppedTensor, tuple[Part, ...]]],
        show: Show | None,
    ) -> list[_Piece]:
        tensors: dict[int, list[torch.Tensor]] = defaultdict(list)
        for tensor in params:
            _, parts = all_parts.get(id(tensor), (None, ()))
            joined = join_parts(parts, self._numbers)
            if len(joined) <= 1:
                tensors[next(iter(joined), AT_ONE)].append(tensor)
            elif show is None:
                self.scaled.append((tensor, parts))
                tensors[AT_ONE].append(tensor)
            else:
                fused = show(tensor, tuple(joined.values()))
                self.fused.append(fused)
                for number, (matrix, _) in joined.items():
                    if fused.views[matrix]:
                        tensors[number].extend(fused.views[matrix])
        # Transformer Engine below 2.18 skips a group that ends in an empty tensor.
        return [
            _Piece(number, sorted(found, key=lambda tensor: tensor.numel() > 0), {})
            for number, found in tensors.items()
        ]

    def fits(self, groups: Sequence[Mapping[str, Any]], numbers: Mapping[str, int]) -> bool:
        """Whether the plan was made for these groups, tensors and equal multipliers."""
        return (
            numbers == self._numbers
            and len(groups) == len(self._params)
            and all(
                len(group["params"]) == len(params)
                and all(a is b for a, b in zip(group["params"], params, strict=True))
                for group, params in zip(groups, self._params, strict=True)
            )
            and not any(fused.is_stale() for fused in self.fused)
        )

    def fill(
        self,
        groups: Sequence[dict[str, Any]],
        multipliers: Mapping[str, float],
        settings: Callable[[dict[str, Any], float], dict[str, Any]],
    ) -> list[list[dict[str, Any]]]:
        """One list of groups in place of each; a group with no tensors here stays as it is.

        Args:
            groups: the optimizer's own groups.
            multipliers: of the matrices.
            settings: (group, multiplier) -> what a piece of it has of its own.
        """
        filled = []
        for base, pieces in zip(groups, self._pieces, strict=True):
            for piece in pieces:
                factor = 1.0
                if piece.number != AT_ONE:
                    factor = multipliers[self._matrix_of[piece.number]]
                piece.group.clear()
                piece.group.update(base)
                piece.group.update(settings(base, factor), params=piece.tensors)
            filled.append([piece.group for piece in pieces] or [base])
        return filled
