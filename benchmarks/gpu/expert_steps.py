"""The step of Megatron's optimizer with thousands of expert matrices on one rank."""

from argparse import Namespace
from typing import Any

import torch.distributed as dist

from benchmarks import many_matrices
from megatron_llr.megatron import launch
from megatron_llr.telemetry.observer import Observer


def time_expert_steps(
    device: str, *, blocks: int = 11, experts: int = 128, hidden: int = 64, ffn: int = 96
) -> dict[str, Any]:
    """Time the optimizer's steps with layer groups and without, alternately.

    Args:
        device: cuda or cpu.
        blocks: blocks of the model.
        experts: experts of each block.
        hidden: width of the model.
        ffn: width of an expert.

    Returns:
        The number of matrices on the rank, the inner optimizer's class, and `seconds`, as
        `many_matrices.time_steps` returns them.
    """
    launch.prepare_device(["--llr-device", device])
    dist.init_process_group("gloo" if device == "cpu" else "nccl")
    given = Namespace(
        blocks=blocks,
        experts=experts,
        hidden=hidden,
        ffn=ffn,
        device=device,
        layout="expert",
        distributed_optimizer=False,
    )
    observer = Observer(say=lambda line: None, log_interval=10**6)
    optimizer, controller = many_matrices.build(given, many_matrices.Clock(), observer)
    controller.prepare()
    return {
        "matrices": len(controller.matrix_index),
        "optimizer": type(optimizer.llr.layer_groups._inner[0].optimizer).__name__,
        "seconds": many_matrices.time_steps(controller, optimizer, device),
    }
