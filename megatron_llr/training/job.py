"""One pretraining job: Megatron's flags plus `--llr-*`, Megatron's loop, and the extension."""

from argparse import Namespace

import torch.distributed as dist

from megatron_llr import host
from megatron_llr.config import LLRConfig
from megatron_llr.controller import LayerwiseController
from megatron_llr.ranks import together
from megatron_llr.training import gpt
from megatron_llr.training.arguments import (
    add_llr_arguments,
    config_from_args,
    refuse_unsupported,
    require_packages,
)
from megatron_llr.training.hooks import installed, use_prebuilt_dataset_helpers


def run_loop(args: Namespace) -> None:
    """Megatron's loop, from parsed flags; the extension has no part in it.

    The model is Megatron's HybridModel where --hybrid-layer-pattern says so, else its GPTModel.
    """
    from_args = (
        host.hybrid_config_from_args if args.hybrid_layer_pattern else host.gpt_config_from_args
    )
    host.pretrain(
        host.pretrain_cfg_container_from_args(args, from_args(args)),
        gpt.datasets_provider,
        host.ModelType.encoder_or_decoder,
        gpt.forward_step,
        get_embedding_ranks=gpt.embedding_ranks,
    )


def _checked(args: Namespace) -> LLRConfig:
    config = config_from_args(args)
    refuse_unsupported(args)
    require_packages(args)
    return config


def pretrain() -> LayerwiseController:
    """Parse `sys.argv`, then train with `megatron.training.pretrain`.

    Returns:
        The controller of the finished run.

    Raises:
        ValueError: for a flag that is wrong or not supported, on every rank.
        SystemExit: with code 0 after `--llr-dry-run`.
    """
    use_prebuilt_dataset_helpers()
    args = host.parse_and_validate_args(extra_args_provider=add_llr_arguments)
    # Alone on this rank where there is no process group yet, which is Megatron's to make.
    config = together(lambda: _checked(args))
    with installed(config) as seams:
        run_loop(args)
    assert seams.controller is not None
    host.print_rank_0(seams.controller.role_summary())
    return seams.controller


def shut_down() -> None:
    """Leave the process group, so that the job ends without a warning."""
    if dist.is_initialized():
        dist.destroy_process_group()
