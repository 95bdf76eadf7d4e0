"""A model's settings, read from and written to Hugging Face's config.json and Megatron's args."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_llr.errors import input_error
from megatron_llr.tools.convert.architecture import SHARED, Architecture, rope_of, rope_parameters
from megatron_llr.tools.convert.model_families import Family, family_named, fits

# The only values of these Megatron args that Hugging Face's families support.
_MEGATRON_REQUIRED: Mapping[str, Any] = {
    "position_embedding_type": "rope",
    "swiglu": True,
    "normalization": "RMSNorm",
    "add_bias_linear": False,
    "rotary_percent": 1.0,
    "rotary_interleaved": False,
    "rotary_seq_len_interpolation_factor": None,
    "no_rope_freq": None,
    "window_attn_skip_freq": None,
    "layernorm_zero_centered_gamma": False,
    "apply_residual_connection_post_layernorm": False,
    "attention_output_gate": False,
    "qk_l2_norm": False,
    "multi_latent_attention": False,
    "num_experts": None,
    "mtp_num_layers": None,
    "hybrid_layer_pattern": None,
    "softmax_type": "vanilla",
    "use_mup": False,
    "activation_func_clamp_value": None,
    "glu_linear_offset": 0.0,
}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ValueError: if the file is missing or is not a JSON object.
    """
    try:
        document = json.loads(path.read_text())
        if not isinstance(document, dict):
            raise TypeError
    except (OSError, ValueError, TypeError) as broken:
        raise input_error(
            f"Cannot read {path}: {str(broken) or 'not a JSON object'}. It must be a JSON object. "
            "Copy the folder again."
        ) from broken
    return document


def _require(settings: Any, required: Mapping[str, Any], where: str) -> None:
    for name, wanted in required.items():
        value = getattr(settings, name, wanted)
        if value != wanted:
            raise input_error(
                f"{where} has {name} = {value!r}, which the other format cannot express: it must "
                f"be {name} = {wanted!r}. This model cannot be converted: it would compute a "
                "different function."
            )


def from_config(path: Path) -> tuple[Family, Architecture]:
    """Family and architecture from a Hugging Face config.json.

    Raises:
        ValueError: for a family without a table, or a setting that Megatron cannot express.
    """
    raw = read_json(path)
    family = family_named(str(raw.get("model_type")))
    # transformers fills in the settings that older config.json files omit.
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(path.parent, local_files_only=True)
    except Exception as broken:
        raise input_error(
            f"transformers cannot read {path}: {type(broken).__name__}: {broken}. It must be a "
            f"valid config.json of model_type {family.model_type}. Copy the folder again."
        ) from broken
    _require(config, family.required, str(path))
    rope = getattr(config, "rope_parameters", None)
    if rope is None:  # transformers before 5
        rope = {"rope_theta": config.rope_theta, **(config.rope_scaling or {})}
    if float(rope["rope_theta"]) != int(rope["rope_theta"]):
        raise input_error(
            f"{path} has rope_theta = {rope['rope_theta']}. It must be a whole number for "
            "Megatron's --rotary-base. This model cannot be converted."
        )
    shared = {ours: getattr(config, theirs) for ours, theirs, _ in SHARED if ours != "channels"}
    return family, Architecture(
        **shared,
        channels=getattr(config, "head_dim", None) or shared["hidden"] // shared["heads"],
        vocab=config.vocab_size,
        rope_theta=float(rope["rope_theta"]),
        rope_scaling=rope_of(rope),
        window=getattr(config, "sliding_window", None) if family.windowed else None,
        tied=bool(config.tie_word_embeddings),
        qkv_bias=family.qkv_bias,
        qk_norm=family.qk_norm,
    )


def to_config(family: Family, model: Architecture, dtype: str) -> dict[str, Any]:
    """A config.json that old and new versions of transformers can read.

    Args:
        family: a family that fits the model.
        model: the architecture.
        dtype: of the weights, such as `float32`.
    """
    assert fits(family, model), (family.model_type, model)
    config: dict[str, Any] = {
        "architectures": [family.class_name],
        "model_type": family.model_type,
        **family.required,
        **{theirs: getattr(model, ours) for ours, theirs, _ in SHARED},
        "vocab_size": model.vocab,
        "rope_theta": model.rope_theta,
        "rope_scaling": rope_parameters(model),
        "tie_word_embeddings": model.tied,
        "torch_dtype": dtype,
    }
    if family.windowed:
        config["sliding_window"] = model.window
    if not family.head_dim:
        del config["head_dim"]
    return config


def from_args(args: Any, vocab: int) -> Architecture:
    """The architecture that a Megatron checkpoint's args describe.

    Args:
        args: the Namespace in the checkpoint's common state.
        vocab: rows of the embedding to keep.

    Raises:
        ValueError: for a setting that no supported Hugging Face family can express.
    """
    _require(args, _MEGATRON_REQUIRED, "The Megatron checkpoint")
    shared = {ours: getattr(args, theirs) for ours, _, theirs in SHARED if ours != "groups"}
    grouped = bool(args.group_query_attention)
    window = getattr(args, "window_size", None)
    return Architecture(
        **shared,
        groups=int(args.num_query_groups) if grouped else shared["heads"],
        vocab=vocab,
        rope_theta=float(args.rotary_base),
        rope_scaling=float(args.rope_scaling_factor) if args.use_rope_scaling else None,
        window=None if window is None else int(window[0]) + 1,
        tied=not args.untie_embeddings_and_output_weights,
        qkv_bias=bool(args.add_qkv_bias),
        qk_norm=bool(args.qk_layernorm),
    )


def to_args(model: Architecture, padded_vocab: int) -> dict[str, Any]:
    """The args in a Megatron checkpoint of the model, for `--use-checkpoint-args`."""
    return {
        **_MEGATRON_REQUIRED,
        **{theirs: getattr(model, ours) for ours, _, theirs in SHARED},
        "seq_length": model.positions,
        "group_query_attention": True,
        "add_position_embedding": True,
        "use_rotary_position_embeddings": False,
        "rotary_base": int(model.rope_theta),
        "use_rope_scaling": model.rope_scaling is not None,
        "rope_scaling_factor": model.rope_scaling or 8.0,
        "window_size": None if model.window is None else (model.window - 1, 0),
        "untie_embeddings_and_output_weights": not model.tied,
        "add_qkv_bias": model.qkv_bias,
        "qk_layernorm": model.qk_norm,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "vocab_size": model.vocab,
        "padded_vocab_size": padded_vocab,
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "ckpt_format": "torch_dist",
    }


def to_flags(model: Architecture, padded_vocab: int) -> list[str]:
    """Megatron's flags for a model, one with its value per entry.

    Args:
        model: the architecture.
        padded_vocab: rows of the embedding. Without this flag Megatron pads the tokenizer's size
            and drops any further rows of the model.
    """
    flags = [
        f"--num-layers {model.layers}",
        f"--hidden-size {model.hidden}",
        f"--ffn-hidden-size {model.ffn}",
        f"--num-attention-heads {model.heads}",
        "--group-query-attention",
        f"--num-query-groups {model.groups}",
        f"--kv-channels {model.channels}",
        f"--max-position-embeddings {model.positions}",
        f"--padded-vocab-size {padded_vocab}",
        "--position-embedding-type rope",
        f"--rotary-base {int(model.rope_theta)}",
        "--normalization RMSNorm",
        f"--norm-epsilon {model.norm_epsilon}",
        "--swiglu",
        "--disable-bias-linear",
        "--attention-dropout 0",
        "--hidden-dropout 0",
    ]
    if model.rope_scaling is not None:
        flags += ["--use-rope-scaling", f"--rope-scaling-factor {model.rope_scaling}"]
    if model.window is not None:
        flags.append(f"--window-size {model.window - 1},0")
    if not model.tied:
        flags.append("--untie-embeddings-and-output-weights")
    if model.qkv_bias:
        flags.append("--add-qkv-bias")
    if model.qk_norm:
        flags.append("--qk-layernorm")
    return flags
