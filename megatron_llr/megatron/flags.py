"""The `--llr-*` flags, and the Megatron flags that are not supported yet."""

from argparse import ArgumentParser, Namespace
from dataclasses import fields
from typing import Any

from megatron.training.argument_utils import ArgumentGroupFactory

from megatron_llr.config import LLRConfig
from megatron_llr.errors import input_error
from megatron_llr.megatron.assembly import UNSTEPPABLE
from megatron_llr.policy_table import summaries
from megatron_llr.script_config import ScriptConfig

_PREFIX = "llr_"


class _PrefixedFlags(ArgumentGroupFactory):  # type: ignore[misc]
    """Megatron's own conversion of a dataclass to flags, with `--llr-` before every name."""

    def _format_arg_name(self, config_attr: str, prefix: str | None = None) -> str:
        name: str = super()._format_arg_name(_PREFIX + config_attr, prefix)
        return name

    def _build_argparse_kwargs_from_field(self, attribute: Any) -> dict[str, Any]:
        kwargs: dict[str, Any] = super()._build_argparse_kwargs_from_field(attribute)
        # The dataclass checks the value: one line that names the flag, on every rank.
        kwargs.pop("choices", None)
        kwargs["dest"] = _PREFIX + attribute.name
        kwargs["help"] = kwargs["help"].replace("POLICIES", summaries()).replace("%", "%%")
        return kwargs


def add_llr_arguments(parser: ArgumentParser) -> ArgumentParser:
    """Add the flags of `LLRConfig` and `ScriptConfig`; for Megatron's `extra_args_provider`."""
    _PrefixedFlags(LLRConfig).build_group(parser, title="layerwise learning rates")
    _PrefixedFlags(ScriptConfig).build_group(parser, title="pretraining script")
    # Some of Megatron's help texts have a bare %, on which argparse fails.
    for action in parser._actions:
        try:
            _ = (action.help or "") % {**vars(action), "prog": parser.prog}
        except (ValueError, TypeError, KeyError):
            action.help = str(action.help).replace("%", "%%")
    return parser


def _from_args[Config: (LLRConfig, ScriptConfig)](
    config_type: type[Config], args: Namespace
) -> Config:
    given = {field.name: getattr(args, _PREFIX + field.name) for field in fields(config_type)}
    return config_type(**given)


def configs_from_args(args: Namespace) -> tuple[LLRConfig, ScriptConfig]:
    """The settings in parsed flags.

    Raises:
        ValueError: naming the flag with an invalid value.
    """
    return _from_args(LLRConfig, args), _from_args(ScriptConfig, args)


_OF_OPTIMIZERS = {name: f"--{name.replace('_', '-')}" for name in UNSTEPPABLE}

# Megatron flags with unsupported values: (attribute of args, the values that are supported, flag).
_UNSUPPORTED: tuple[tuple[str, tuple[Any, ...], str], ...] = (
    ("hybrid_context_parallel", (False,), "--hybrid-context-parallel"),
    ("experimental_attention_variant", (None,), "--experimental-attention-variant"),
    ("heterogeneous_layers_config_path", (None,), "--heterogeneous-layers-config-path"),
    (
        "heterogeneous_layers_config_encoded_json",
        (None, ""),
        "--heterogeneous-layers-config-encoded-json",
    ),
    ("gtp_weight_remat_size", (1,), "--tensor-parallel-num-weight-shards"),
    ("expert_gtp_weight_remat_size", (1,), "--expert-tensor-parallel-num-weight-shards"),
    ("moe_single_grouped_weight", (False,), "--moe-single-grouped-weight"),
    ("use_megatron_fsdp", (False,), "--use-megatron-fsdp"),
    ("use_torch_fsdp2", (False,), "--use-torch-fsdp2"),
    ("optimizer", ("adam", "sgd", "muon", "soap", "lion"), "--optimizer"),
    *((name, (False,), flag) for name, flag in _OF_OPTIMIZERS.items()),
    ("fp4_param_gather", (False,), "--fp4-param-gather"),
    ("sft", (False,), "--sft"),
    ("fim_data", (False,), "--fim-data"),
    ("dataloader_inter_document_masking", (False,), "--dataloader-inter-document-masking"),
    ("perform_rl_step", (False,), "--perform-rl-step"),
    ("logits_load_dir", (None,), "--logits-load-dir"),
    ("skip_train", (False,), "--skip-train"),
    ("yaml_cfg", (None,), "--yaml-cfg"),
)

_NO_IDS = "it builds weights that have no matrix ids"
_DTENSORS = (
    "it steps DTensors in place of weights, which layer groups cannot read (docs/layouts.md)"
)
_SHARDS = "it shards the weights of each tensor-parallel rank, which is not supported"
# Why a flag is refused. A flag without a reason is untested.
_REASONS = {
    "--hybrid-context-parallel": "it needs packed sequences, which batches here are not",
    "--experimental-attention-variant": _NO_IDS,
    "--heterogeneous-layers-config-path": _NO_IDS,
    "--heterogeneous-layers-config-encoded-json": _NO_IDS,
    "--tensor-parallel-num-weight-shards": _SHARDS,
    "--expert-tensor-parallel-num-weight-shards": _SHARDS,
    "--moe-single-grouped-weight": "its experts are one tensor without an id for each of them",
    "--use-megatron-fsdp": _DTENSORS,
    "--use-torch-fsdp2": _DTENSORS,
    "--optimizer": "Megatron's adaptive_muon fails in its first step with emerging-optimizers 0.3",
    **{flag: UNSTEPPABLE[name] for name, flag in _OF_OPTIMIZERS.items()},
}

# Flags that conflict with --llr-fixed-validation, in the same form.
_NOT_WITH_FIXED_VALIDATION: tuple[tuple[str, tuple[Any, ...], str], ...] = (
    ("full_validation", (False,), "--full-validation"),
    ("multiple_validation_sets", (False,), "--multiple-validation-sets"),
    # Cyclic shuffles: other samples in every evaluation.
    ("dataloader_type", ("single",), "--dataloader-type"),
)


def refuse_unsupported(args: Namespace) -> None:
    """Refuse, before anything is built, flags that this version does not support.

    Raises:
        ValueError: naming the first one.
    """
    fixed = _NOT_WITH_FIXED_VALIDATION if args.llr_fixed_validation else ()
    for row in (*_UNSUPPORTED, *fixed):
        attribute, supported, flag = row
        value = getattr(args, attribute, supported[0])
        if value not in supported:
            reason = f": {_REASONS[flag]}" if flag in _REASONS else ""
            context = " with --llr-fixed-validation" if row in fixed else ""
            other = (
                "leave --llr-fixed-validation out" if context else "train without this extension"
            )
            raise input_error(
                f"{flag} is not supported yet{context}{reason}. It is {value} and must be "
                f"{' or '.join(str(choice) for choice in supported)}. Leave {flag} out, or {other}."
            )
