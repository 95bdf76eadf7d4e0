"""One pretraining job: Megatron's flags plus `--llr-*`, Megatron's loop, and the extension."""

from argparse import Namespace

import torch.distributed as dist
from megatron.core.enums import ModelType
from megatron.training import pretrain as megatron_pretrain
from megatron.training import print_rank_0
from megatron.training.argument_utils import (
    gpt_config_from_args,
    hybrid_config_from_args,
    pretrain_cfg_container_from_args,
)
from megatron.training.arguments import parse_and_validate_args, parse_args

from megatron_llr.config import LLRConfig
from megatron_llr.controller import LayerwiseController
from megatron_llr.megatron import batches, launch
from megatron_llr.megatron.flags import (
    add_llr_arguments,
    configs_from_args,
    refuse_unsupported,
)
from megatron_llr.megatron.fp8_widths import check_fp8_widths
from megatron_llr.megatron.package_needs import require_packages
from megatron_llr.megatron.seams import installed, use_prebuilt_dataset_helpers
from megatron_llr.megatron.warm_up import start_up
from megatron_llr.ranks import together
from megatron_llr.script_config import ScriptConfig


def run_loop(args: Namespace) -> None:
    """Megatron's loop, from parsed flags, without the extension.

    The model is Megatron's HybridModel with --hybrid-layer-pattern, else its GPTModel.
    """
    from_args = hybrid_config_from_args if args.hybrid_layer_pattern else gpt_config_from_args
    with start_up(args.normalization):
        megatron_pretrain(
            pretrain_cfg_container_from_args(args, from_args(args)),
            batches.datasets_provider,
            ModelType.encoder_or_decoder,
            batches.forward_step,
            get_embedding_ranks=batches.embedding_ranks,
        )


def pretrain() -> LayerwiseController:
    """Parse `sys.argv`, then train with `megatron.training.pretrain`.

    Returns:
        The controller of the finished run.

    Raises:
        ValueError: for a flag that is wrong or not supported, on every rank.
        SystemExit: with code 0 after `--llr-dry-run`.
    """
    use_prebuilt_dataset_helpers()
    # Parsing alone needs no package. Validation builds the tokenizer and asks for versions.
    parsed = parse_args(add_llr_arguments)
    together(lambda: require_packages(parsed, gpu=launch.on_gpu()))
    args = parse_and_validate_args(extra_args_provider=add_llr_arguments)

    def checked_configs() -> tuple[LLRConfig, ScriptConfig]:
        configs = configs_from_args(args)
        refuse_unsupported(args)
        check_fp8_widths(args)
        return configs

    # No process group exists yet in a new process, so this checks only the local rank.
    config, script = together(checked_configs)
    with installed(config, script) as seams:
        run_loop(args)
    assert seams.controller is not None
    print_rank_0(seams.controller.role_summary())
    return seams.controller


def shut_down() -> None:
    """Leave the process group, so that the job ends without a warning."""
    if dist.is_initialized():
        dist.destroy_process_group()
