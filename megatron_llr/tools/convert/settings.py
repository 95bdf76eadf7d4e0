"""A model's settings, read from and written to Hugging Face's config.json and Megatron's args."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_llr.errors import input_error, shown
from megatron_llr.tools.convert.architecture import SHARED, Architecture, rope_of, rope_parameters
from megatron_llr.tools.convert.input_files import read_json
from megatron_llr.tools.convert.model_families import Family, family_named, fits

# The only values of these Megatron args that Hugging Face's families support. Where there are
# several, they mean the same; the first is the one that the converter writes.
_MEGATRON_REQUIRED: Mapping[str, tuple[Any, ...]] = {
    "position_embedding_type": ("rope",),
    "rope_type": (None, "rope"),
    "swiglu": (True,),
    "normalization": ("RMSNorm",),
    "add_bias_linear": (False,),
    "rotary_percent": (1.0,),
    "rotary_interleaved": (False,),
    "rotary_seq_len_interpolation_factor": (None, 1),
    "no_rope_freq": (None,),
    "layernorm_zero_centered_gamma": (False,),
    "apply_residual_connection_post_layernorm": (False,),
    "attention_output_gate": (False,),
    "experimental_attention_variant": (None,),
    "qk_l2_norm": (False,),
    "multi_latent_attention": (False,),
    "num_experts": (None,),
    "mtp_num_layers": (None, 0),
    "hybrid_layer_pattern": (None, ""),
    "heterogeneous_layers_config_path": (None,),
    "heterogeneous_layers_config_encoded_json": (None, ""),
    "softmax_type": ("vanilla",),
    "use_mup": (False,),
    "activation_func_clamp_value": (None,),
    "glu_linear_offset": (0.0,),
}

# The settings of a config.json that a conversion depends on. Others are not given to transformers:
# some of them make it allocate as much as they say, such as num_labels.
_READ = (
    *(theirs for _, theirs, _ in SHARED),
    "vocab_size",
    "tie_word_embeddings",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "partial_rotary_factor",
    "sliding_window",
    "use_sliding_window",
    "max_window_layers",
    "layer_types",
)
# None is their default: as many as query heads, and hidden / heads.
_OPTIONAL = ("num_key_value_heads", "head_dim")
_MAX_LAYERS = 10_000
_MAX_SIZE = 2**31 - 1


def _require(settings: Any, required: Mapping[str, tuple[Any, ...]], where: str) -> None:
    for name, supported in required.items():
        value = getattr(settings, name, supported[0])
        plain = value is None or isinstance(value, bool | int | float | str)
        if not plain or value not in supported:
            raise input_error(
                f"{where} has {name} = {shown(value)}, which the other format cannot express: it "
                f"must be {name} = {' or '.join(map(repr, supported))}. This model cannot be "
                "converted: it would compute a different function."
            )


def _require_size(value: object, name: str, where: str) -> None:
    """Refuse a setting that is not a positive integer; a special value such as -1 is not."""
    largest = _MAX_LAYERS if name in ("num_hidden_layers", "num_layers") else _MAX_SIZE
    if type(value) is not int or not 1 <= value <= largest:
        raise input_error(
            f"{where} has {name} = {shown(value)}. It must be a whole number from 1 to {largest}. "
            "Correct it, or copy the model again."
        )


def _checked(model: Architecture, where: str, names: Mapping[str, str]) -> Architecture:
    """The architecture, if all its values are in range.

    Args:
        model: values of any type, as read from a file.
        where: the file, for the error.
        names: attribute -> name of the setting in the file, where it differs.
    """
    sizes = "layers hidden ffn heads groups channels vocab positions".split()
    for name in [*sizes, *(["window"] if model.window is not None else [])]:
        _require_size(getattr(model, name), names.get(name, name), where)
    factors = ["norm_epsilon", "rope_theta"]
    for name in [*factors, *(["rope_scaling"] if model.rope_scaling is not None else [])]:
        value = getattr(model, name)
        if type(value) not in (int, float) or not math.isfinite(value) or value <= 0:
            raise input_error(
                f"{where} has {names.get(name, name)} = {shown(value)}. It must be a number above "
                "0. Correct it, or copy the model again."
            )
    if model.heads % model.groups:
        raise input_error(
            f"{where} has {names['heads']} = {model.heads} and {names['groups']} = {model.groups}. "
            "The number of heads must be a multiple of the number of groups. Correct one of them, "
            "or copy the model again."
        )
    return model


def _with_defaults(path: Path, family: Family) -> Any:
    """The config as transformers completes it, with `rope_parameters` in every version.

    Raises:
        ValueError: if transformers refuses it, or it names weights in other files.
    """
    raw = read_json(path)
    if raw.get("transformers_weights"):
        raise input_error(
            f"{path} has transformers_weights = {shown(raw['transformers_weights'])}. The "
            "converter reads only model.safetensors or its index. Rename the file and remove the "
            "setting."
        )
    for name in (*(theirs for ours, theirs, _ in SHARED if ours != "norm_epsilon"), "vocab_size"):
        if name in raw and not (raw[name] is None and name in _OPTIONAL):
            _require_size(raw[name], name, str(path))
    from transformers import AutoConfig

    read = (*_READ, *family.required)
    try:
        config = AutoConfig.for_model(family.model_type, **{k: raw[k] for k in read if k in raw})
        if getattr(config, "rope_parameters", None) is None:  # transformers before 5
            config.rope_parameters = {
                "rope_theta": config.rope_theta,
                **(config.rope_scaling or {}),
            }
        # Computed here, where a bad value is one of transformers' errors.
        float(config.rope_parameters["rope_theta"])
        if getattr(config, "head_dim", None) is None:
            config.head_dim = config.hidden_size // config.num_attention_heads
    except Exception as broken:
        reason = " ".join(str(broken).split())[:300]
        raise input_error(
            f"transformers cannot read {path}: {type(broken).__name__}: {reason}. It must be a "
            f"valid config.json of model_type {family.model_type}. Copy the folder again."
        ) from broken
    return config


def from_config(path: Path) -> tuple[Family, Architecture]:
    """Family and architecture from a Hugging Face config.json.

    Raises:
        ValueError: for a family without a table, or a setting that Megatron cannot express.
    """
    family = family_named(read_json(path).get("model_type"))
    config = _with_defaults(path, family)
    _require(config, {name: (value,) for name, value in family.required.items()}, str(path))
    rope = config.rope_parameters
    theta = float(rope["rope_theta"])
    if not math.isfinite(theta) or theta != int(theta):
        raise input_error(
            f"{path} has rope_theta = {theta}. It must be a whole number for Megatron's "
            "--rotary-base. This model cannot be converted."
        )
    partial = rope.get("partial_rotary_factor")
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if kinds or partial not in (None, 1.0):
        given = f"layer_types {min(kinds)}" if kinds else f"partial_rotary_factor {partial}"
        raise input_error(
            f"{path} has {given}, which Megatron's model cannot express. It must have "
            "full_attention in all layers and rotate all channels. This model cannot be converted."
        )
    model = Architecture(
        **{ours: getattr(config, theirs) for ours, theirs, _ in SHARED},
        vocab=config.vocab_size,
        rope_theta=theta,
        rope_scaling=rope_of(rope),
        window=getattr(config, "sliding_window", None) if family.windowed else None,
        tied=bool(config.tie_word_embeddings),
        qkv_bias=family.qkv_bias,
        qk_norm=family.qk_norm,
    )
    names = {ours: theirs for ours, theirs, _ in SHARED}
    names |= {"vocab": "vocab_size", "window": "sliding_window", "rope_scaling": "rope factor"}
    return family, _checked(model, str(path), names)


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
    where = "The Megatron checkpoint"
    _require(args, _MEGATRON_REQUIRED, where)
    window = _window(getattr(args, "window_size", None))
    if window is not None:
        _require(args, {"window_attn_skip_freq": (None,)}, where)
    shared: dict[str, Any] = {ours: getattr(args, theirs, None) for ours, _, theirs in SHARED}
    # Megatron's value for attention without groups is None or, without its flag, ignored.
    if not getattr(args, "group_query_attention", False) or shared["groups"] is None:
        shared["groups"] = shared["heads"]
    scaled = getattr(args, "use_rope_scaling", False)
    model = Architecture(
        **shared,
        vocab=vocab,
        rope_theta=getattr(args, "rotary_base", None),  # type: ignore[arg-type]  # checked below
        rope_scaling=getattr(args, "rope_scaling_factor", math.nan) if scaled else None,
        window=window,
        tied=not getattr(args, "untie_embeddings_and_output_weights", False),
        qkv_bias=bool(getattr(args, "add_qkv_bias", False)),
        qk_norm=bool(getattr(args, "qk_layernorm", False)),
    )
    names = {ours: theirs for ours, _, theirs in SHARED}
    names |= {"rope_theta": "rotary_base", "rope_scaling": "rope_scaling_factor"}
    return _checked(model, where, names)


def _window(size: Any) -> int | None:
    """Tokens that a query attends to, from Megatron's window_size.

    It is (left, right) without the token itself, and -1 is no limit
    (megatron/core/transformer/transformer_config.py).
    """
    if size is None:
        return None
    left, right = -1, 1
    if isinstance(size, list | tuple) and [type(side) for side in size] == [int, int]:
        left, right = size
    if left == -1 and right in (-1, 0):
        return None
    if not 0 <= left < _MAX_SIZE or right != 0:
        raise input_error(
            f"The Megatron checkpoint has window_size = {shown(size)}, which the other format "
            "cannot express: it must be None, (-1, 0), or (left, 0) with left of at least 0. This "
            "model cannot be converted: it would compute a different function."
        )
    return left + 1


def to_args(model: Architecture, padded_vocab: int) -> dict[str, Any]:
    """The args in a Megatron checkpoint of the model, for `--use-checkpoint-args`."""
    return {
        **{name: supported[0] for name, supported in _MEGATRON_REQUIRED.items()},
        **{theirs: getattr(model, ours) for ours, _, theirs in SHARED},
        "seq_length": model.positions,
        "group_query_attention": True,
        "add_position_embedding": True,
        "use_rotary_position_embeddings": False,
        "rotary_base": int(model.rope_theta),
        "use_rope_scaling": model.rope_scaling is not None,
        "rope_scaling_factor": model.rope_scaling or 8.0,
        "window_size": None if model.window is None else (model.window - 1, 0),
        "window_attn_skip_freq": None,
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
