"""One Megatron tensor and the Hugging Face tensors that it is fused from: splitting and fusing."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod

import torch

from megatron_llr.matrices.layout import Span
from megatron_llr.megatron.weight_names import HeldRows, TransformerShape, row_layout
from megatron_llr.tools.convert.architecture import Architecture
from megatron_llr.tools.convert.model_families import DIMENSIONS, MODEL_ROWS, Family, TensorRow

LAYER_PREFIX = "decoder.layers."
"""Prefix of a layer's tensors in Megatron, which stacks those of all layers in one tensor."""


@dataclass(frozen=True)
class FusedPart:
    """A Hugging Face tensor: its name, its shape, and the spans of its rows in the fused tensor."""

    name: str
    shape: tuple[int, ...]
    spans: tuple[Span, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.shape)


@dataclass(frozen=True)
class Link:
    """A Megatron tensor, of one layer or of the model, and its parts.

    Attributes:
        key: the tensor's key in a Megatron checkpoint, without the layer's number.
        layer: the layer's number, or None.
        shape: of the tensor, vocabulary padding included.
        parts: the tensors that it is fused from; not empty.
    """

    key: str
    layer: int | None
    shape: tuple[int, ...]
    parts: tuple[FusedPart, ...]

    def fuse(self, parts: Iterable[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        """The Megatron tensor made of the parts, in order; padding rows are zero.

        With an iterator only one part is held at a time.
        """
        if len(self.parts) == 1 and self.parts[0].shape == self.shape:
            (tensor,) = parts
            return tensor.to(dtype)
        fused = torch.zeros(self.shape, dtype=dtype)
        for part, tensor in zip(self.parts, parts, strict=True):
            for span in part.spans:
                fused[span.local : span.local + span.count] = tensor[
                    span.logical : span.logical + span.count
                ]
        return fused

    def split(self, fused: torch.Tensor) -> dict[str, torch.Tensor]:
        """The parts of a Megatron tensor, by name; no two share storage."""
        if len(self.parts) == 1:
            (part,) = self.parts
            return {part.name: fused[: part.shape[0]]}
        return {
            part.name: torch.cat(
                [fused[span.local : span.local + span.count] for span in part.spans]
            )
            for part in self.parts
        }


def _parts(row: TensorRow, prefix: str, model: Architecture) -> tuple[FusedPart, ...]:
    shapes: dict[str, tuple[int, ...]] = {}
    for role in row.parts:
        sizes = tuple(model.sizes[dimension] for dimension in DIMENSIONS[role])
        shapes[role] = sizes[:1] if row.megatron.endswith(".bias") else sizes
    rows = sum(shape[0] for shape in shapes.values())
    layout = row_layout(row.megatron)
    if layout is None:
        (role,) = row.parts
        spans: Mapping[str, tuple[Span, ...]] = {role: (Span(0, 0, rows),)}
    else:
        shape = TransformerShape(
            heads=model.heads,
            query_groups=model.groups,
            channels=model.channels,
            gated_mlp=True,
            gated_attention=False,
        )
        spans = layout(shape, HeldRows(rows))
    return tuple(
        FusedPart(prefix + name, shapes[role], tuple(spans[role]))
        for role, name in row.parts.items()
    )


def links_of(family: Family, model: Architecture, padded_vocab: int) -> list[Link]:
    """All tensors of a model, in the order of its forward pass.

    Args:
        family: the model's family.
        model: the architecture.
        padded_vocab: rows of Megatron's embedding and head.
    """
    links: list[Link] = []

    def add(row: TensorRow, layer: int | None) -> None:
        if row.when(model):
            prefix = "" if layer is None else family.layer_prefix.format(layer)
            parts = _parts(row, prefix, model)
            padded = padded_vocab if {"embedding", "head"} & set(row.parts) else None
            key = row.megatron if layer is None else LAYER_PREFIX + row.megatron
            rows = padded or sum(part.shape[0] for part in parts)
            links.append(Link(key, layer, (rows, *parts[0].shape[1:]), parts))

    embedding, *rest = MODEL_ROWS
    add(embedding, None)
    for layer in range(model.layers):
        for row in family.layer_rows:
            add(row, layer)
    for row in rest:
        add(row, None)
    return links
