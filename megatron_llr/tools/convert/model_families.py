"""The model families that can be converted, with one table each.

A row maps a Megatron tensor to the Hugging Face tensors in it. Names of a layer's tensors omit the
prefix of the layer. Megatron's checkpoint keys are the same for its local and its Transformer
Engine layers (megatron/core/models/gpt/gpt_layer_specs.py maps the former onto the latter).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_llr.errors import input_error
from megatron_llr.tools.convert.architecture import Architecture

# Role of a tensor -> its dimensions, by the names in Architecture.sizes; a bias has the first only.
DIMENSIONS: Mapping[str, tuple[str, ...]] = {
    "embedding": ("vocab", "hidden"),
    "head": ("vocab", "hidden"),
    "q": ("queries", "hidden"),
    "k": ("keys", "hidden"),
    "v": ("keys", "hidden"),
    "o": ("hidden", "queries"),
    "gate": ("ffn", "hidden"),
    "up": ("ffn", "hidden"),
    "down": ("hidden", "ffn"),
    "norm": ("hidden",),
    "head_norm": ("channels",),
}

Condition = Callable[[Architecture], bool]


@dataclass(frozen=True)
class TensorRow:
    """One Megatron tensor.

    Attributes:
        megatron: its key in a checkpoint, without the prefix of the layer.
        parts: role -> Hugging Face tensor, in the order in which Megatron fuses them.
        when: whether a model has the tensor.
    """

    megatron: str
    parts: Mapping[str, str]
    when: Condition = field(default=lambda model: True)


MODEL_ROWS = (
    TensorRow("embedding.word_embeddings.weight", {"embedding": "model.embed_tokens.weight"}),
    TensorRow("decoder.final_layernorm.weight", {"norm": "model.norm.weight"}),
    TensorRow("output_layer.weight", {"head": "lm_head.weight"}, lambda model: not model.tied),
)

_NORMS = (
    TensorRow("self_attention.linear_qkv.layer_norm_weight", {"norm": "input_layernorm.weight"}),
    TensorRow("mlp.linear_fc1.layer_norm_weight", {"norm": "post_attention_layernorm.weight"}),
)
_QKV = TensorRow(
    "self_attention.linear_qkv.weight",
    {
        "q": "self_attn.q_proj.weight",
        "k": "self_attn.k_proj.weight",
        "v": "self_attn.v_proj.weight",
    },
)
_QKV_BIAS = TensorRow(
    "self_attention.linear_qkv.bias",
    {"q": "self_attn.q_proj.bias", "k": "self_attn.k_proj.bias", "v": "self_attn.v_proj.bias"},
    lambda model: model.qkv_bias,
)
_QK_NORM = (
    TensorRow(
        "self_attention.q_layernorm.weight",
        {"head_norm": "self_attn.q_norm.weight"},
        lambda model: model.qk_norm,
    ),
    TensorRow(
        "self_attention.k_layernorm.weight",
        {"head_norm": "self_attn.k_norm.weight"},
        lambda model: model.qk_norm,
    ),
)
_OUTPUT = TensorRow("self_attention.linear_proj.weight", {"o": "self_attn.o_proj.weight"})
_MLP = (
    TensorRow(
        "mlp.linear_fc1.weight", {"gate": "mlp.gate_proj.weight", "up": "mlp.up_proj.weight"}
    ),
    TensorRow("mlp.linear_fc2.weight", {"down": "mlp.down_proj.weight"}),
)
_DENSE = (*_NORMS, _QKV, _QKV_BIAS, *_QK_NORM, _OUTPUT, *_MLP)


@dataclass(frozen=True)
class Family:
    """A model type of Hugging Face.

    Attributes:
        model_type: `model_type` in config.json.
        class_name: its causal language model in `transformers`.
        layer_rows: tensors of a layer.
        layer_prefix: their prefix in Hugging Face; `{}` is the layer's number.
        qkv_bias: whether q, k and v have biases.
        qk_norm: whether heads of q and k are normalized.
        windowed: whether `sliding_window` in its config.json applies to every layer.
        head_dim: whether its config.json can set the width of a head.
        required: the only values of these config.json settings that Megatron's model supports.
        ignored: suffixes of unused tensors in old checkpoints.
    """

    model_type: str
    class_name: str
    layer_rows: tuple[TensorRow, ...] = _DENSE
    layer_prefix: str = "model.layers.{}."
    qkv_bias: bool = False
    qk_norm: bool = False
    windowed: bool = False
    head_dim: bool = True
    required: Mapping[str, Any] = field(default_factory=lambda: {"hidden_act": "silu"})
    ignored: tuple[str, ...] = ("rotary_emb.inv_freq",)


# A Megatron model is written as the first family that fits it.
FAMILIES: tuple[Family, ...] = (
    Family(
        "llama",
        "LlamaForCausalLM",
        required={"hidden_act": "silu", "attention_bias": False, "mlp_bias": False},
    ),
    Family("mistral", "MistralForCausalLM", windowed=True),
    Family(
        "qwen2",
        "Qwen2ForCausalLM",
        qkv_bias=True,
        head_dim=False,
        required={"hidden_act": "silu", "use_sliding_window": False},
    ),
    Family(
        "qwen3",
        "Qwen3ForCausalLM",
        qk_norm=True,
        required={"hidden_act": "silu", "use_sliding_window": False, "attention_bias": False},
    ),
)


def family_named(model_type: object) -> Family:
    """The family with this `model_type`.

    Raises:
        ValueError: if there is none.
    """
    matching = [family for family in FAMILIES if family.model_type == model_type]
    if not matching:
        raise input_error(
            f"Models with model_type {str(model_type)[:80]!r} cannot be converted. Supported are "
            f"{', '.join(family.model_type for family in FAMILIES)}. To add a family, add a row to "
            "FAMILIES in megatron_llr/tools/convert/model_families.py."
        )
    return matching[0]


def fits(family: Family, model: Architecture) -> bool:
    """Whether the family can express the model."""
    return (
        (family.qkv_bias, family.qk_norm) == (model.qkv_bias, model.qk_norm)
        and (family.windowed or model.window is None)
        and (family.head_dim or model.channels * model.heads == model.hidden)
    )


def family_for(model: Architecture) -> Family:
    """The first family that can express the model.

    Raises:
        ValueError: if there is none.
    """
    matching = [family for family in FAMILIES if fits(family, model)]
    if not matching:
        supported = "; ".join(
            f"{f.model_type}: qkv bias {f.qkv_bias}, q/k norm {f.qk_norm}" for f in FAMILIES
        )
        raise input_error(
            "No Hugging Face family has this combination of features: "
            f"qkv bias {model.qkv_bias}, q/k norm {model.qk_norm}, window {model.window}. "
            f"Supported are {supported}. To add a family, add a row to FAMILIES in "
            "megatron_llr/tools/convert/model_families.py."
        )
    return matching[0]
