"""LLRConfig: the flags are pinned, every bad value names its flag."""

from dataclasses import fields
from typing import Any, get_args

import pytest

from megatron_llr import LLRConfig
from megatron_llr.config import Kind, flag, settings_of, shared_settings
from megatron_llr.script_config import ScriptConfig

FLAGS = """
--llr-policy --llr-min-multiplier --llr-max-multiplier --llr-interval --llr-ramp-iters
--llr-active-fraction --llr-active-iters --llr-estimator --llr-mapping --llr-inverse --llr-quantile
--llr-mean-preserving --llr-granularity --llr-role-table --llr-role-factors --llr-depth-floor
--llr-random-seed --llr-weight-decay --llr-step --llr-hyperball --llr-hyperball-lr --llr-embedding
--llr-router
--llr-spectrum --llr-spectrum-source --llr-farms-rows --llr-farms-windows --llr-measure-memory
--llr-log-dir --llr-log-relative-update --llr-log-matrices --llr-skip-unknown --llr-reset-state
--llr-dry-run --llr-explain --llr-same-start --llr-fixed-validation --llr-device
""".split()


def test_the_flags_are_these() -> None:
    """A new flag is a decision: it is added here too."""
    assert [flag(each.name) for each in (*fields(LLRConfig), *fields(ScriptConfig))] == FLAGS


def test_every_setting_has_a_kind() -> None:
    """Its kind says what another value means to a saved state and to the other ranks."""
    for config_type in (LLRConfig, ScriptConfig):
        names = settings_of(config_type, *get_args(Kind))
        assert names == tuple(each.name for each in fields(config_type))
    assert settings_of(LLRConfig, "local") == ("log_dir",)
    assert settings_of(LLRConfig, "window") == ("active_fraction", "active_iters")
    assert settings_of(ScriptConfig, "start") == tuple(each.name for each in fields(ScriptConfig))
    shared = {**shared_settings(LLRConfig()), **shared_settings(ScriptConfig())}
    assert shared.keys() == set(FLAGS) - {"--llr-log-dir"}


def test_the_library_has_no_setting_of_the_script() -> None:
    with pytest.raises(TypeError, match="dry_run"):
        LLRConfig(dry_run=True)  # type: ignore[call-arg]


def test_the_defaults_are_the_published_settings() -> None:
    config = LLRConfig()
    assert (config.min_multiplier, config.max_multiplier) == (1.0, 5.0)
    assert (config.interval, config.ramp_iters, config.active_fraction) == (100, 50, 0.2)
    assert (config.estimator, config.mapping, config.embedding) == ("hill_median", "linear", "max")
    assert config.granularity == "projection"


@pytest.mark.parametrize(
    ("values", "flag_name"),
    [
        ({"policy": "sharpest"}, "--llr-policy"),
        ({"estimator": "alpha"}, "--llr-estimator"),
        ({"mapping": "cubic"}, "--llr-mapping"),
        ({"granularity": "layer"}, "--llr-granularity"),
        ({"spectrum": "approximate"}, "--llr-spectrum"),
        ({"device": "tpu"}, "--llr-device"),
        ({"log_matrices": "experts"}, "--llr-log-matrices"),
        ({"weight_decay": "none"}, "--llr-weight-decay"),
        ({"step": "whole"}, "--llr-step"),
        ({"min_multiplier": 0.0}, "--llr-min-multiplier"),
        ({"min_multiplier": 6.0}, "--llr-min-multiplier"),
        ({"max_multiplier": float("inf")}, "--llr-max-multiplier"),
        ({"max_multiplier": float("nan")}, "--llr-max-multiplier"),
        ({"interval": 0}, "--llr-interval"),
        ({"interval": 50, "ramp_iters": 50}, "--llr-ramp-iters"),
        ({"ramp_iters": -1}, "--llr-ramp-iters"),
        ({"active_fraction": 0.0}, "--llr-active-fraction"),
        ({"active_fraction": 1.5}, "--llr-active-fraction"),
        ({"active_iters": 0}, "--llr-active-iters"),
        ({"quantile": 0.5}, "--llr-quantile"),
        ({"policy": "module:"}, "--llr-policy"),
        ({"policy": "a b:c"}, "--llr-policy"),
        ({"policy": "fixed"}, "--llr-role-table"),
        ({"depth_floor": 0.0}, "--llr-depth-floor"),
        ({"role_factors": "q"}, "--llr-role-factors"),
        ({"role_factors": ""}, "--llr-role-factors"),
        ({"role_factors": "q=0"}, "--llr-role-factors"),
        ({"role_factors": "q=1,q=2"}, "--llr-role-factors"),
        ({"role_factors": "query=2"}, "--llr-role-factors"),
        ({"policy": "alphadecay", "role_factors": "q=2"}, "--llr-role-factors"),
        ({"estimator": "ks", "policy": "shape"}, "--llr-policy"),
        ({"spectrum": "farms", "policy": "shape"}, "--llr-policy"),
        ({"depth_floor": 1.1}, "--llr-depth-floor"),
        ({"farms_rows": 49}, "--llr-farms-rows"),
        ({"farms_windows": 0}, "--llr-farms-windows"),
        ({"measure_memory": 0.0}, "--llr-measure-memory"),
        ({"measure_memory": float("inf")}, "--llr-measure-memory"),
        ({"policy": "embedding-only", "embedding": "measured"}, "--llr-embedding"),
        ({"policy": "alphadecay", "weight_decay": "decoupled"}, "--llr-weight-decay"),
        ({"role_table": "roles.json"}, "--llr-role-table"),
        ({"embedding": "biggest"}, "--llr-embedding"),
        ({"embedding": "-1"}, "--llr-embedding"),
    ],
)
def test_a_bad_value_is_one_line_that_names_its_flag(
    values: dict[str, Any], flag_name: str
) -> None:
    with pytest.raises(ValueError, match=r"^megatron_llr: --llr-") as caught:
        (ScriptConfig if "device" in values else LLRConfig)(**values)
    text = str(caught.value)
    if flag_name == "--llr-role-table":
        # Either of the two settings may be changed.
        assert "--llr-role-table" in text
        assert f" {list(values.values())[-1]} " in text
        assert "--llr-policy fixed" in text
    else:
        assert f"{flag_name} {list(values.values())[-1]} is not valid. It must be " in text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("embedding", "multiplier"),
    [("max", 5.0), ("one", 1.0), ("measured", None), ("2.5", 2.5)],
)
def test_the_embedding_policies(embedding: str, multiplier: float | None) -> None:
    assert LLRConfig(embedding=embedding).embedding_multiplier() == multiplier
