"""The architecture of a dense LLaMA-style model, independent of either format. Pure Python."""

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_llr.errors import input_error


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A decoder with grouped-query attention, rotary positions, RMSNorm and SwiGLU.

    Attributes:
        layers: number of blocks.
        hidden: width of the residual stream.
        ffn: hidden width of the MLP.
        heads: query heads.
        groups: key/value heads.
        channels: width of one head.
        vocab: rows of the embedding, without padding.
        positions: longest sequence.
        norm_epsilon: added to the mean square in RMSNorm.
        rope_theta: base of the rotary frequencies.
        rope_scaling: factor of LLaMA 3's frequency scaling, or None.
        window: tokens that a query attends to, itself included, or None for all.
        tied: whether the head is the embedding.
        qkv_bias: whether q, k and v have biases.
        qk_norm: whether heads of q and k are normalised.
    """

    layers: int
    hidden: int
    ffn: int
    heads: int
    groups: int
    channels: int
    vocab: int
    positions: int
    norm_epsilon: float
    rope_theta: float
    rope_scaling: float | None = None
    window: int | None = None
    tied: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False

    @property
    def sizes(self) -> dict[str, int]:
        """Lengths of tensor dimensions, by their names in the family tables."""
        return {
            "hidden": self.hidden,
            "ffn": self.ffn,
            "queries": self.heads * self.channels,
            "keys": self.groups * self.channels,
            "channels": self.channels,
            "vocab": self.vocab,
        }


# Attributes that both formats store unchanged: ours, Hugging Face's config, Megatron's args.
SHARED = (
    ("layers", "num_hidden_layers", "num_layers"),
    ("hidden", "hidden_size", "hidden_size"),
    ("ffn", "intermediate_size", "ffn_hidden_size"),
    ("heads", "num_attention_heads", "num_attention_heads"),
    ("groups", "num_key_value_heads", "num_query_groups"),
    ("channels", "head_dim", "kv_channels"),
    ("positions", "max_position_embeddings", "max_position_embeddings"),
    ("norm_epsilon", "rms_norm_eps", "layernorm_epsilon"),
)

# LLaMA 3's frequency scaling with the constants that are fixed in Megatron
# (megatron/core/models/common/embeddings/rotary_pos_embedding.py, _apply_scaling).
_LLAMA3_ROPE = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def rope_of(parameters: Mapping[str, Any]) -> float | None:
    """Factor of LLaMA 3's rotary scaling in a Hugging Face config, or None without scaling.

    Raises:
        ValueError: for a scaling that Megatron's rotary embedding does not support.
    """
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if kind == "default":
        return None
    same = all(parameters.get(key) == value for key, value in _LLAMA3_ROPE.items())
    factor = parameters.get("factor")
    if kind != "llama3" or not same or type(factor) not in (int, float):
        raise input_error(
            f"The model scales its rotary frequencies with {reprlib.repr(dict(parameters))}, which "
            f"Megatron cannot do. It supports no scaling, or rope_type llama3 with a factor and "
            f"{_LLAMA3_ROPE}. This model cannot be converted: it would compute a different "
            "function."
        )
    return float(factor)  # type: ignore[arg-type]


def rope_parameters(architecture: Architecture) -> dict[str, Any] | None:
    """The `rope_scaling` entry of a Hugging Face config."""
    if architecture.rope_scaling is None:
        return None
    return {"rope_type": "llama3", "factor": architecture.rope_scaling, **_LLAMA3_ROPE}
