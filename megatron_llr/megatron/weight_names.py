"""Which weight of a Megatron model is which logical matrix: one table row per weight name.

A new weight is one row here and one test; nothing else in the package knows a model family.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

from megatron_llr.matrices.layout import Span, Spans, interleaved, sectioned, stacked
from megatron_llr.matrices.shard import Initializer


@dataclass(frozen=True)
class TransformerShape:
    """What the row layouts depend on, from Megatron's TransformerConfig.

    Attributes:
        heads: attention heads.
        query_groups: key/value heads.
        channels: rows of one head.
        gated_mlp: whether `linear_fc1` holds gate and up.
        gated_attention: whether `linear_qkv` holds an output gate as large as q.
        latent_query: rows of the query's down projection in multi-latent attention; 0 without one.
    """

    heads: int
    query_groups: int
    channels: int
    gated_mlp: bool
    gated_attention: bool
    latent_query: int = 0

    @classmethod
    def of(cls, config: Any) -> "TransformerShape":
        """Read the shape off a TransformerConfig."""
        return cls(
            heads=config.num_attention_heads,
            query_groups=config.num_query_groups or config.num_attention_heads,
            channels=config.kv_channels,
            gated_mlp=bool(config.gated_linear_unit),
            gated_attention=bool(getattr(config, "attention_output_gate", False)),
            latent_query=getattr(config, "q_lora_rank", None) or 0,
        )


@dataclass(frozen=True, slots=True)
class HeldRows:
    """The rows of a parameter that one rank holds.

    Attributes:
        count: their number.
        shard: position of the rank among those that share the rows.
        shards: number of those.
        sections: rows of each of the parts that the rank holds one after the other, where the
            parameter says so (Megatron's `partition_sizes`).
    """

    count: int
    shard: int = 0
    shards: int = 1
    sections: Sequence[int] = field(default=())


RowLayout = Callable[[TransformerShape, HeldRows], Spans]
"""(shape of the model, rows held) -> runs of rows of every role."""


def whole(role: str) -> RowLayout:
    """Layout of a parameter that is one logical matrix."""
    return lambda shape, held: {role: (Span(0, held.shard * held.count, held.count),)}


def _sections(role: str) -> RowLayout:
    return lambda shape, held: {role: sectioned(held.sections, held.shard, held.shards)}


def _qkv(shape: TransformerShape, held: HeldRows) -> Spans:
    queries = shape.heads // shape.query_groups * shape.channels
    parts = [("q", queries)]
    if shape.gated_attention:
        parts.append(("gate", queries))
    parts += [("k", shape.channels), ("v", shape.channels)]
    return interleaved(parts, shape.query_groups, held.shard * held.count, held.count)


def _latent_qkv(shape: TransformerShape, held: HeldRows) -> Spans:
    rest = held.count * held.shards - shape.latent_query
    parts = [("q_down", shape.latent_query), ("kv_down", rest)]
    return interleaved(parts, 1, held.shard * held.count, held.count)


def _fc1(shape: TransformerShape, held: HeldRows) -> Spans:
    roles = ("gate", "up") if shape.gated_mlp else ("up",)
    return stacked(roles, held.count, held.shard)


# Which of TransformerConfig's initializers Megatron draws a weight with.
INPUT: Initializer = attrgetter("init_method")
OUTPUT: Initializer = attrgetter("output_layer_init_method")
EMBEDDING: Initializer = attrgetter("embedding_init_method")


def _head_initializer(config: Any) -> Any:
    return EMBEDDING(config) if getattr(config, "use_mup", False) else INPUT(config)


@dataclass(frozen=True)
class WeightRule:
    """One weight of a block.

    Attributes:
        path: name of the weight below its layer; `#` is the number of an expert, among
            those that the rank holds.
        module: module in its matrix ids: `attention`, `mlp`, `mlp.expert`, `mlp.shared`, `mamba`.
        parameter: word for the whole Megatron parameter, for `--llr-granularity parameter`.
        layout: rows of the roles it holds.
        initializer: what Megatron draws it with.
    """

    path: str
    module: str
    parameter: str
    layout: RowLayout
    initializer: Initializer

    @property
    def of_expert(self) -> bool:
        """Whether expert parallelism splits it, and expert tensor parallelism its rows."""
        return EXPERT in self.path


@dataclass(frozen=True)
class SingleWeight:
    """A weight that is one logical matrix, outside the blocks or next to the block of a
    multi-token prediction layer.

    Attributes:
        role: last word of its matrix id.
        initializer: what Megatron draws it with.
    """

    role: str
    initializer: Initializer


EXPERT = "#"


def _one(path: str, module: str, role: str, initializer: Initializer) -> WeightRule:
    """A weight of a block that is one logical matrix."""
    return WeightRule(path, module, role, whole(role), initializer)


BLOCK_WEIGHTS: tuple[WeightRule, ...] = (
    WeightRule("self_attention.linear_qkv.weight", "attention", "qkv", _qkv, INPUT),
    _one("self_attention.linear_proj.weight", "attention", "o", OUTPUT),
    # multi-latent attention
    _one("self_attention.linear_q_proj.weight", "attention", "q", INPUT),
    _one("self_attention.linear_q_down_proj.weight", "attention", "q_down", INPUT),
    _one("self_attention.linear_q_up_proj.weight", "attention", "q_up", INPUT),
    _one("self_attention.linear_kv_down_proj.weight", "attention", "kv_down", INPUT),
    _one("self_attention.linear_kv_up_proj.weight", "attention", "kv_up", INPUT),
    WeightRule(
        "self_attention.linear_qkv_down_proj.weight", "attention", "qkv_down", _latent_qkv, INPUT
    ),
    # dense feed-forward
    WeightRule("mlp.linear_fc1.weight", "mlp", "fc1", _fc1, INPUT),
    _one("mlp.linear_fc2.weight", "mlp", "down", OUTPUT),
    # experts: SequentialMLP, then TEGroupedMLP
    WeightRule("mlp.experts.local_experts.#.linear_fc1.weight", "mlp.expert", "fc1", _fc1, INPUT),
    _one("mlp.experts.local_experts.#.linear_fc2.weight", "mlp.expert", "down", OUTPUT),
    WeightRule("mlp.experts.linear_fc1.weight#", "mlp.expert", "fc1", _fc1, INPUT),
    _one("mlp.experts.linear_fc2.weight#", "mlp.expert", "down", OUTPUT),
    # the rest of a mixture of experts
    _one("mlp.router.weight", "mlp", "router", INPUT),
    _one("mlp.fc1_latent_proj.weight", "mlp", "latent_down", INPUT),
    _one("mlp.fc2_latent_proj.weight", "mlp", "latent_up", OUTPUT),
    WeightRule("mlp.shared_experts.linear_fc1.weight", "mlp.shared", "fc1", _fc1, INPUT),
    _one("mlp.shared_experts.linear_fc2.weight", "mlp.shared", "down", OUTPUT),
    _one("mlp.shared_experts.gate_weight", "mlp.shared", "mix", INPUT),
    # Mamba
    WeightRule("mixer.in_proj.weight", "mamba", "in_proj", _sections("in_proj"), INPUT),
    _one("mixer.out_proj.weight", "mamba", "out_proj", OUTPUT),
)

# Weights outside the blocks, by their name in the model.
MODEL_WEIGHTS: dict[str, SingleWeight] = {
    "embedding.word_embeddings.weight": SingleWeight("embedding", EMBEDDING),
    "embedding.position_embeddings.weight": SingleWeight("position_embedding", EMBEDDING),
    "output_layer.weight": SingleWeight("head", _head_initializer),
}

# Weights of a multi-token prediction layer next to the block in it, by their name below the layer.
PREDICTION_WEIGHTS: dict[str, SingleWeight] = {"eh_proj.weight": SingleWeight("eh_proj", INPUT)}

# Tensors of more than one dimension that are no matrices, by their name below the layer: their
# multiplier is 1. The convolution of a Mamba mixer has one short filter per channel.
NO_MATRICES = frozenset({"mixer.conv1d_weight", "mixer.conv1d.weight"})

_BY_PATH = {rule.path: rule for rule in BLOCK_WEIGHTS}
_EXPERT_NUMBER = re.compile(r"(?<=^mlp\.experts\.local_experts\.)\d+(?=\.)|(?<=\.weight)\d+$")


def find_rule(path: str) -> tuple[WeightRule, int | None] | None:
    """The table row of a weight and the number of its expert on this rank; None if it has no row.

    Args:
        path: name of the weight below its layer.
    """
    number = _EXPERT_NUMBER.search(path)
    rule = _BY_PATH.get(_EXPERT_NUMBER.sub(EXPERT, path, count=1))
    return None if rule is None else (rule, int(number[0]) if number else None)


def row_layout(path: str) -> RowLayout | None:
    """How the rows of a block's weight, or of its bias, are laid out; None if it has no row.

    Args:
        path: name of the tensor below its layer, as `self_attention.linear_qkv.bias`.
    """
    module, _, tensor = path.rpartition(".")
    rule = _BY_PATH.get(f"{module}.weight") if tensor in ("weight", "bias") else None
    return rule.layout if rule else None
