"""Which elements of the tensors that an optimizer steps belong to which logical matrix."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from megatron_llr.matrices.layout import flat_ranges
from megatron_llr.megatron.catalog import build_catalog
from megatron_llr.megatron.stepped_tensors import inner_optimizers


@dataclass(frozen=True, eq=False)
class SteppedElements:
    """Elements of one stepped tensor with a common learning rate.

    Attributes:
        matrix: id of their logical matrix; None for elements of no matrix.
        tensor: the tensor that the inner optimizer steps.
        optimizer: that inner optimizer.
        mask: bool, [elements of the tensor], on its device.
    """

    matrix: str | None
    tensor: torch.Tensor
    optimizer: Any
    mask: torch.Tensor


def stepped_elements(
    model_chunks: list[torch.nn.Module], optimizer: Any
) -> Iterator[SteppedElements]:
    """All elements that this rank steps. Every element is in exactly one of them.

    Args:
        model_chunks: model chunks of this rank.
        optimizer: Megatron's optimizer.
    """
    shards = build_catalog(model_chunks).shards
    for inner, tensors in inner_optimizers(optimizer):
        for stepped in tensors:
            tensor = stepped.tensor
            others = torch.ones(tensor.numel(), dtype=torch.bool, device=tensor.device)
            for shard in shards:
                if shard.parameter is not stepped.parameter:
                    continue
                mask = torch.zeros_like(others)
                columns = shard.parameter.shape[1]
                spans = shard.placement.spans
                for first, last in flat_ranges(spans, columns, stepped.start, stepped.stop):
                    mask[first:last] = True
                others &= ~mask
                yield SteppedElements(str(shard.matrix), tensor, inner, mask)
            if others.any():
                yield SteppedElements(None, tensor, inner, others)
