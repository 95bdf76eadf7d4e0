"""Special values of settings, such as None and -1, in both directions of a conversion."""

import json
import math
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

import pytest

from megatron_llr.tools.convert import settings
from megatron_llr.tools.convert.architecture import SHARED

INTEGERS = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "vocab_size",
)


def config(tmp_path: Path, models: Path, family: str, **changes: Any) -> Path:
    """A config.json with changed settings."""
    document = json.loads((models / family / "config.json").read_text())
    for name, value in changes.items():
        document[name] = value
    (tmp_path / "config.json").write_text(json.dumps(document))
    return tmp_path / "config.json"


@pytest.mark.parametrize("value", [0, -1, None, 1.5, True, "4", [4], 2**40])
@pytest.mark.parametrize("name", INTEGERS)
def test_a_size_is_a_positive_integer(name: str, value: Any, models: Path, tmp_path: Path) -> None:
    """None is a special value of one of them: as many key/value heads as query heads."""
    path = config(tmp_path, models, "llama", **{name: value})
    if name == "num_key_value_heads" and value is None:
        assert settings.from_config(path)[1].groups == 4
        return
    with pytest.raises(ValueError, match=f"^megatron_llr: .*{name}"):
        settings.from_config(path)


def read(path: Path) -> Any:
    return settings.from_config(path)[1]


def test_special_values_of_a_config(models: Path, tmp_path: Path) -> None:
    assert read(config(tmp_path, models, "mistral", sliding_window=None)).window is None
    assert read(config(tmp_path, models, "mistral", sliding_window=1)).window == 1
    assert read(config(tmp_path, models, "mistral", head_dim=None)).channels == 32
    # Qwen's window applies only with use_sliding_window.
    for window in (None, 0, -1, 7):
        changes = {"sliding_window": window, "use_sliding_window": False}
        assert read(config(tmp_path, models, "qwen2", **changes)).window is None
    full = ["full_attention"] * 4
    assert read(config(tmp_path, models, "qwen3", layer_types=full)).layers == 4
    # Ids of special tokens are not read: LLaMA used -1 for no padding token.
    tokens = {"pad_token_id": -1, "bos_token_id": -1, "eos_token_id": [-1, 3]}
    assert read(config(tmp_path, models, "llama", **tokens)).vocab == 250
    scaling = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0}
    assert read(config(tmp_path, models, "llama", rope_parameters=scaling)).rope_scaling is None
    # The number of labels and the like do not allocate anything.
    assert read(config(tmp_path, models, "llama", num_labels=10**12)).layers == 4


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_theta": 500000.0,
}
BAD_CONFIGS = [
    ("mistral", {"sliding_window": 0}, "sliding_window = 0"),
    ("mistral", {"sliding_window": -1}, "sliding_window = -1"),
    ("mistral", {"head_dim": 0}, "head_dim = 0"),
    ("qwen3", {"head_dim": -1}, "head_dim = -1"),
    ("llama", {"num_key_value_heads": 3}, "multiple of the number of groups"),
    ("llama", {"rms_norm_eps": 0.0}, "rms_norm_eps = 0.0"),
    ("llama", {"rms_norm_eps": -1.0}, "rms_norm_eps = -1.0"),
    ("llama", {"rms_norm_eps": math.nan}, "rms_norm_eps = nan"),
    ("llama", {"rope_parameters": {**LLAMA3, "rope_theta": -1}}, "rope_theta"),
    ("llama", {"rope_parameters": {**LLAMA3, "rope_theta": math.inf}}, "rope_theta"),
    ("llama", {"rope_parameters": {**LLAMA3, "rope_theta": 0.5}}, "rope_theta"),
    ("llama", {"rope_parameters": {**LLAMA3, "factor": -1.0}}, "rope factor = -1.0"),
    ("llama", {"rope_parameters": {**LLAMA3, "factor": None}}, "factor"),
    ("llama", {"rope_parameters": {**LLAMA3, "partial_rotary_factor": 0.5}}, "partial_rotary"),
    ("qwen3", {"layer_types": ["full_attention", "sliding_attention"] * 2}, "sliding_attention"),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 7}, "use_sliding_window = True"),
    ("llama", {"tie_word_embeddings": "no"}, "tie_word_embeddings"),
    ("llama", {"model_type": None}, "model_type 'None'"),
    ("llama", {"model_type": ["llama"]}, "cannot be converted"),
]


@pytest.mark.parametrize(("family", "changes", "expected"), BAD_CONFIGS)
def test_a_special_value_that_means_nothing_is_refused(
    family: str, changes: dict[str, Any], expected: str, models: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=f"^megatron_llr: .*{expected}"):
        settings.from_config(config(tmp_path, models, family, **changes))


@pytest.fixture
def args(models: Path) -> Namespace:
    _, model = settings.from_config(models / "llama" / "config.json")
    return Namespace(**settings.to_args(model, 256))


def changed(args: Namespace, **changes: Any) -> Any:
    return settings.from_args(Namespace(**{**vars(args), **changes}), 250)


def test_special_values_of_megatrons_args(args: Namespace) -> None:
    """-1 is no limit of a window, None or 0 no layer, None or 1 no interpolation."""
    for window in (None, (-1, -1), (-1, 0), [-1, 0]):
        skipped = {"window_attn_skip_freq": 4}
        assert changed(args, window_size=window, **skipped).window is None
    assert changed(args, window_size=(0, 0)).window == 1
    assert changed(args, window_size=[6, 0]).window == 7
    assert changed(args, group_query_attention=False, num_query_groups=1).groups == 4
    assert changed(args, num_query_groups=None).groups == 4
    assert changed(args, use_rope_scaling=False, rope_scaling_factor=-1).rope_scaling is None
    for none in (
        {"mtp_num_layers": 0},
        {"hybrid_layer_pattern": ""},
        {"rotary_seq_len_interpolation_factor": 1},
        {"rope_type": "rope"},
        {"glu_linear_offset": 0},
        {"rotary_percent": 1},
    ):
        assert changed(args, **none) == changed(args)


BAD_ARGS = [
    ({"window_size": (6, -1)}, "window_size"),
    ({"window_size": (-2, 0)}, "window_size"),
    ({"window_size": (6, 6)}, "window_size"),
    ({"window_size": (-1, 3)}, "window_size"),
    ({"window_size": 6}, "window_size = 6"),
    ({"window_size": ()}, "window_size"),
    ({"window_size": (6, 0), "window_attn_skip_freq": 2}, "window_attn_skip_freq = 2"),
    ({"num_query_groups": 0}, "num_query_groups = 0"),
    ({"num_query_groups": -1}, "num_query_groups = -1"),
    ({"kv_channels": None}, "kv_channels = None"),
    ({"ffn_hidden_size": None}, "ffn_hidden_size = None"),
    ({"rotary_base": -1}, "rotary_base = -1"),
    ({"rotary_base": None}, "rotary_base = None"),
    ({"rope_scaling_factor": -1.0}, "rope_scaling_factor = -1.0"),
    ({"layernorm_epsilon": None}, "layernorm_epsilon = None"),
    ({"no_rope_freq": 4}, "no_rope_freq = 4"),
    ({"num_experts": 8}, "num_experts = 8"),
    ({"mtp_num_layers": 1}, "mtp_num_layers = 1"),
    ({"rotary_seq_len_interpolation_factor": 2}, "interpolation_factor = 2"),
    ({"rope_type": "yarn"}, "rope_type = 'yarn'"),
    ({"swiglu": [True] * 10**6}, r"swiglu = \[True, .{0,60}\.\.\.\]"),
    *(({name: -1}, f"{name} = -1") for _, _, name in SHARED if name != "layernorm_epsilon"),
    *(({name: "x"}, f"{name} = 'x'") for _, _, name in SHARED),
]


@pytest.mark.parametrize(("changes", "expected"), BAD_ARGS)
def test_args_that_no_family_can_express_are_refused(
    changes: dict[str, Any], expected: str, args: Namespace
) -> None:
    with pytest.raises(ValueError, match=f"^megatron_llr: .*{expected}"):
        changed(args, **changes)


def test_every_setting_exists_in_megatron() -> None:
    """A misspelled one would never be checked."""
    from megatron.training.arguments import add_megatron_arguments

    parser = add_megatron_arguments(ArgumentParser(allow_abbrev=False))
    known = {action.dest for action in parser._actions}
    used = {*settings._MEGATRON_REQUIRED, *(name for _, _, name in SHARED)}
    used |= {"window_size", "window_attn_skip_freq", "rotary_base", "rope_scaling_factor"}
    used |= {"use_rope_scaling", "add_qkv_bias", "qk_layernorm", "group_query_attention"}
    used |= {"null_tokenizer_eod_id", "tokenizer_type", "tokenizer_model", "special_tokens"}
    assert not used - known
