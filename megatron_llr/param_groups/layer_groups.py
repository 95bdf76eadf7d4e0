"""The layer groups of all inner optimizers on a rank."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import torch

from megatron_llr.matrices.layout import flat_ranges
from megatron_llr.matrices.shard import MatrixShard
from megatron_llr.param_groups.inner_groups import InnerGroups
from megatron_llr.param_groups.stepped_tensor import SteppedTensor
from megatron_llr.param_groups.views import Part

Stepped = tuple[SteppedTensor, tuple[Part, ...]]
"""A tensor that an optimizer steps, and the matrices in it."""


class LayerGroups:
    """The layer groups of all inner optimizers on this rank.

    Args:
        optimizers: every inner optimizer of this rank with the tensors that it steps.
        shards: catalog of this rank.
        decoupled_decay: whether a matrix decays as at multiplier 1.
        on_decay: whether the multipliers are factors on the weight decay, not on the rate.
        step: `--llr-step`: auto, fused or grouped.
    """

    def __init__(
        self,
        optimizers: Iterable[tuple[torch.optim.Optimizer, Sequence[SteppedTensor]]],
        shards: Sequence[MatrixShard],
        *,
        decoupled_decay: bool = False,
        on_decay: bool = False,
        step: str = "auto",
    ) -> None:
        self.decoupled_decay, self.on_decay = decoupled_decay, on_decay
        by_parameter = _by_parameter(shards)
        self._inner: list[InnerGroups] = []
        for optimizer, stepped in optimizers:
            parts = {
                id(each.tensor): (each, _parts(each, by_parameter[id(each.parameter)]))
                for each in stepped
                if id(each.parameter) in by_parameter
            }
            self._inner.append(
                InnerGroups(
                    optimizer, parts, decoupled_decay=decoupled_decay, on_decay=on_decay, step=step
                )
            )

    @property
    def matrices(self) -> list[str]:
        """Those of which this rank's optimizers step a part."""
        return [matrix for inner in self._inner for matrix in inner.matrices]

    @property
    def inseparable(self) -> dict[str, str]:
        """Matrix that must share its parameter's multiplier -> the optimizer that demands it."""
        return {
            matrix: type(inner.optimizer).__name__
            for inner in self._inner
            for master, parts in inner.parts.values()
            if inner.is_inseparable(master.tensor)
            for matrix, _ in parts
        }

    def base_settings(self, matrix: str) -> tuple[float, float] | None:
        """Base learning rate and weight decay of a matrix; None if this rank does not step it.

        The rate is that of the last step, or of the next where none was made.
        """
        for inner in self._inner:
            rates = {id(t): float(rate) for rate, tensors in inner.base_rates for t in tensors}
            tensors = {
                id(stepped.tensor)
                for stepped, parts in inner.parts.values()
                if any(name == matrix for name, _ in parts)
            }
            for group in inner.optimizer.param_groups:
                for tensor in group["params"]:
                    if id(tensor) in tensors:
                        rate = rates.get(id(tensor), float(group["lr"]))
                        return rate, float(group.get("weight_decay", 0.0))
        return None

    def set_multipliers(self, multipliers: Mapping[str, float]) -> None:
        """Multipliers for the next update; a matrix that is not named has 1."""
        for inner in self._inner:
            inner.multipliers = {m: multipliers[m] for m in inner.matrices if m in multipliers}

    def parts_in(self, shards: Sequence[MatrixShard]) -> list[tuple[InnerGroups, list[Stepped]]]:
        """Every inner optimizer, and the parts of matrices in the tensors that it steps.

        Args:
            shards: catalog of this rank; rows that it leaves out (padding) are in no part.
        """
        by_parameter = _by_parameter(shards)
        return [
            (
                inner,
                [
                    (stepped, _parts(stepped, by_parameter[id(stepped.parameter)]))
                    for stepped, _ in inner.parts.values()
                ],
            )
            for inner in self._inner
        ]


def _by_parameter(shards: Sequence[MatrixShard]) -> dict[int, list[MatrixShard]]:
    found: dict[int, list[MatrixShard]] = defaultdict(list)
    for shard in shards:
        found[id(shard.parameter)].append(shard)
    return found


def _parts(master: SteppedTensor, shards: Sequence[MatrixShard]) -> tuple[Part, ...]:
    """The matrices of one parameter inside the slice of it that an optimizer steps."""
    columns = master.parameter.shape[1]
    found = [
        (shard.matrix, flat_ranges(shard.placement.spans, columns, master.start, master.stop))
        for shard in shards
    ]
    # A slice of a vocabulary's padding alone holds no element of a matrix, but steps with it.
    return tuple(found) if len(found) == 1 else tuple(part for part in found if part[1])
