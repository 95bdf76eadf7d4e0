"""The layer groups that replace an optimizer's groups, built once and reused while they are valid.

Which tensors and views share a group depends on which factors are equal, not on their values. A
plan therefore stays valid during a ramp.
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_llr.matrices.ids import MatrixId
from megatron_llr.matrices.layout import join_ranges
from megatron_llr.param_groups.stepped_tensor import Factors, MatrixRanges, TensorMatrices
from megatron_llr.param_groups.views import FusedTensor

MULTIPLIER_ONE = 0
"""Class index of matrices whose learning rate and weight decay have factor 1."""
DIRECTION = -1
"""Class index of matrices that are stepped at rate 1 without decay (`hyperball`)."""

MakeViews = Callable[[torch.Tensor, tuple[MatrixRanges, ...]], FusedTensor]
"""(tensor, matrices in it) -> views of the tensor, one set per matrix."""


def equal_factors(
    matrices: Iterable[MatrixId],
    multipliers: Mapping[MatrixId, float],
    factors: Factors,
    directions: Collection[MatrixId] = (),
) -> dict[MatrixId, int]:
    """Matrix id -> class index, shared by matrices of equal factors. Default multiplier 1.

    Those in `directions` have class `DIRECTION`.
    """
    classes: dict[tuple[float, float], int] = {(1.0, 1.0): MULTIPLIER_ONE}
    return {
        matrix: DIRECTION
        if matrix in directions
        else classes.setdefault(factors(matrix, multipliers.get(matrix, 1.0)), len(classes))
        for matrix in matrices
    }


def join_by_class(
    parts: Sequence[MatrixRanges], classes: Mapping[MatrixId, int]
) -> dict[int, MatrixRanges]:
    """Class index -> the ranges of all matrices of that class, under the id of the first.

    Ranges that touch are joined, so adjacent experts of equal multiplier need one view.
    """
    members: dict[int, list[MatrixRanges]] = defaultdict(list)
    for part in parts:
        members[classes[part[0]]].append(part)
    return {
        index: same[0]
        if len(same) == 1
        else (same[0][0], join_ranges(sorted(run for _, ranges in same for run in ranges)))
        for index, same in members.items()
    }


@dataclass(frozen=True, slots=True)
class _LayerGroup:
    """A layer group: its class index, its tensors, and the dict that `fill` updates."""

    index: int
    tensors: list[torch.Tensor]
    group: dict[str, Any]


class StepPlan:
    """The layer groups that replace each param group of an optimizer.

    Args:
        groups: the optimizer's own groups.
        parts: id of a stepped tensor -> the tensor and the matrices in it.
        classes: result of `equal_factors`.
        make_views: creates the views of a tensor; None if the optimizer supports no views.

    Attributes:
        fused: tensors that are stepped as views.
        views: ids of all views.
        scaled: tensors that are stepped whole although the multipliers of their matrices differ.
    """

    def __init__(
        self,
        groups: Sequence[Mapping[str, Any]],
        parts: Mapping[int, TensorMatrices],
        classes: Mapping[MatrixId, int],
        make_views: MakeViews | None,
    ) -> None:
        self.fused: list[FusedTensor] = []
        self.scaled: list[tuple[torch.Tensor, tuple[MatrixRanges, ...]]] = []
        self._classes = classes
        self._matrix_of = {index: matrix for matrix, index in classes.items()}
        self._params = [list(group["params"]) for group in groups]
        self._layer_groups = [self._divide(params, parts, make_views) for params in self._params]
        self.views = {id(view) for f in self.fused for vs in f.views.values() for view in vs}

    def _divide(
        self,
        params: Sequence[torch.Tensor],
        all_parts: Mapping[int, TensorMatrices],
        make_views: MakeViews | None,
    ) -> list[_LayerGroup]:
        """Divide the tensors of one param group by class."""
        tensors: dict[int, list[torch.Tensor]] = defaultdict(list)
        for tensor in params:
            _, parts = all_parts.get(id(tensor), (None, ()))
            joined = join_by_class(parts, self._classes)
            if len(joined) <= 1:
                tensors[next(iter(joined), MULTIPLIER_ONE)].append(tensor)
            elif make_views is None:
                self.scaled.append((tensor, parts))
                tensors[MULTIPLIER_ONE].append(tensor)
            else:
                fused = make_views(tensor, tuple(joined.values()))
                self.fused.append(fused)
                for index, (matrix, _) in joined.items():
                    if fused.views[matrix]:
                        tensors[index].extend(fused.views[matrix])
        # Transformer Engine below 2.18 skips a group that ends in an empty tensor.
        return [
            _LayerGroup(index, sorted(same, key=lambda tensor: tensor.numel() > 0), {})
            for index, same in tensors.items()
        ]

    def fits(self, groups: Sequence[Mapping[str, Any]], classes: Mapping[MatrixId, int]) -> bool:
        """Whether the plan was built for these groups, tensors and classes."""
        return (
            classes == self._classes
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
        multipliers: Mapping[MatrixId, float],
        factors: Factors,
    ) -> list[list[dict[str, Any]]]:
        """The layer groups that replace each group; a group without tensors is not replaced.

        Args:
            groups: the optimizer's own groups.
            multipliers: of the matrices. Default 1.
            factors: factors on learning rate and weight decay of a matrix for a multiplier.
        """
        filled = []
        for base, layer_groups in zip(groups, self._layer_groups, strict=True):
            for layer in layer_groups:
                on_rate = on_decay = 1.0
                if layer.index not in (MULTIPLIER_ONE, DIRECTION):
                    matrix = self._matrix_of[layer.index]
                    on_rate, on_decay = factors(matrix, multipliers.get(matrix, 1.0))
                group = layer.group
                group.clear()
                # A product is a copy: the scheduler overwrites a rate that is a tensor in place.
                group.update(base, lr=base["lr"] * on_rate, params=layer.tensors)
                if "weight_decay" in base:
                    group["weight_decay"] = base["weight_decay"] * on_decay
                if layer.index == DIRECTION:
                    group.update(lr=base["lr"] * 0 + 1.0, weight_decay=0.0)
                if isinstance(base.get("step"), torch.Tensor):
                    group["step"] = base["step"].clone()
            filled.append([layer.group for layer in layer_groups] or [base])
        return filled
