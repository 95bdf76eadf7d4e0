"""Which weight of a Megatron model is which logical matrix: one table row per weight name.

A new weight is one row here and one test; nothing else in the package knows a model family.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_llr.sharding.layout import Span, Spans, interleaved, stacked


@dataclass(frozen=True)
class TransformerShape:
    """What the row layouts depend on, from Megatron's TransformerConfig.

    Attributes:
        heads: attention heads.
        query_groups: key/value heads.
        channels: rows of one head.
        gated_mlp: whether `linear_fc1` holds gate and up.
        gated_attention: whether `linear_qkv` holds an output gate as large as q.
    """

    heads: int
    query_groups: int
    channels: int
    gated_mlp: bool
    gated_attention: bool

    @classmethod
    def of(cls, config: Any) -> "TransformerShape":
        """Read the shape off a TransformerConfig."""
        return cls(
            heads=config.num_attention_heads,
            query_groups=config.num_query_groups or config.num_attention_heads,
            channels=config.kv_channels,
            gated_mlp=bool(config.gated_linear_unit),
            gated_attention=bool(getattr(config, "attention_output_gate", False)),
        )


RowLayout = Callable[[TransformerShape, int, int], Spans]
"""(shape, rows held by one rank, position of the rank) -> runs of rows of every role."""


def _whole(role: str) -> RowLayout:
    return lambda shape, rows, shard: {role: (Span(0, shard * rows, rows),)}


def _qkv(shape: TransformerShape, rows: int, shard: int) -> Spans:
    queries = shape.heads // shape.query_groups * shape.channels
    parts = [("q", queries)]
    if shape.gated_attention:
        parts.append(("gate", queries))
    parts += [("k", shape.channels), ("v", shape.channels)]
    return interleaved(parts, shape.query_groups, shard * rows, rows)


def _fc1(shape: TransformerShape, rows: int, shard: int) -> Spans:
    return stacked(("gate", "up") if shape.gated_mlp else ("up",), rows, shard)


@dataclass(frozen=True)
class WeightRule:
    """One weight of a block.

    Attributes:
        path: name of the weight below its layer.
        prefix: what its matrix ids begin with, below the block.
        parameter: word for the whole Megatron parameter, for `--llr-granularity parameter`.
        layout: rows of the roles it holds.
    """

    path: str
    prefix: str
    parameter: str
    layout: RowLayout


BLOCK_WEIGHTS: tuple[WeightRule, ...] = (
    WeightRule("self_attention.linear_qkv.weight", "attention", "qkv", _qkv),
    WeightRule("self_attention.linear_proj.weight", "attention", "o", _whole("o")),
    WeightRule("mlp.linear_fc1.weight", "mlp", "fc1", _fc1),
    WeightRule("mlp.linear_fc2.weight", "mlp", "down", _whole("down")),
)

# Weights outside the blocks: name in the model -> matrix id.
MODEL_WEIGHTS: dict[str, str] = {
    "embedding.word_embeddings.weight": "embedding",
    "embedding.position_embeddings.weight": "position_embedding",
    "output_layer.weight": "head",
}

# The parameter is one logical matrix, and its id needs no role after it.
WHOLE: RowLayout = _whole("")

_BY_MODULE = {rule.path.removesuffix(".weight"): rule.layout for rule in BLOCK_WEIGHTS}


def row_layout(path: str) -> RowLayout | None:
    """How the rows of a block's weight, or of the bias beside it, are laid out; None of others.

    Args:
        path: name of the tensor below its layer, as `self_attention.linear_qkv.bias`.
    """
    module, _, tensor = path.rpartition(".")
    return _BY_MODULE.get(module) if tensor in ("weight", "bias") else None
