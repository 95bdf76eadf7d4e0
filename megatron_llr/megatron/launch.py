"""Choose where a job runs, before anything imports megatron."""

import sys
from collections.abc import Sequence
from typing import get_args

import torch

from megatron_llr.config import DeviceName
from megatron_llr.errors import user_error
from megatron_llr.megatron.packages import check_transformer_engine

_FLAG = "--llr-device"

# Fused kernels and NCCL need a GPU; without one Megatron is told to use neither. Nor NVIDIA's
# checkpoint writer (nvidia-resiliency-ext) for --async-save, but its own.
CPU_FLAGS = (
    "--transformer-impl=local",
    "--distributed-backend=gloo",
    "--use-cpu-initialization",
    "--num-workers=0",
    "--no-masked-softmax-fusion",
    "--no-bias-gelu-fusion",
    "--no-bias-swiglu-fusion",
    "--no-bias-dropout-fusion",
    "--no-rope-fusion",
    "--no-gradient-accumulation-fusion",
    "--no-persist-layer-norm",
    "--async-strategy=mcore",
)


def wanted_device(arguments: Sequence[str]) -> str:
    """`cuda` or `cpu`, from `--llr-device` on the command line or from what the machine has.

    Raises:
        ValueError: if the flag has another value, or asks for CUDA where there is none.
    """
    device = "auto"
    for position, argument in enumerate(arguments):
        if argument == _FLAG:
            device = arguments[position + 1] if position + 1 < len(arguments) else ""
        elif argument.startswith(_FLAG + "="):
            device = argument.removeprefix(_FLAG + "=")
    if device not in get_args(DeviceName):
        raise user_error(
            f"bad {_FLAG}",
            got=device or "nothing",
            allowed=", ".join(get_args(DeviceName)),
            remedy="set it",
        )
    has_gpu = torch.cuda.is_available()
    if device == "cuda" and not has_gpu:
        raise user_error(
            f"{_FLAG} cuda on a machine where torch sees no GPU",
            got="no CUDA device",
            allowed=f"{_FLAG} cpu or auto here",
            remedy=f"set {_FLAG} cpu, or run where nvidia-smi lists a GPU",
        )
    return ("cuda" if has_gpu else "cpu") if device == "auto" else device


def prepare_device(arguments: list[str]) -> list[str]:
    """Ready this process for the device that a command line asks for.

    On the CPU route this loads the substitutions and adds the flags that they need, before the
    user's own, so that an explicit flag still wins. Call before megatron is imported.

    Args:
        arguments: the command line without the program's name.

    Returns:
        The arguments that Megatron is to parse.

    Raises:
        ValueError: see `wanted_device`; also where Transformer Engine is installed by half.
    """
    check_transformer_engine()
    if wanted_device(arguments) == "cuda":
        return arguments
    from megatron_llr.cpu import emulation

    emulation.enable()
    return [*CPU_FLAGS, *arguments]


def main_arguments() -> None:
    """`prepare_device` on this process's own command line."""
    sys.argv[1:] = prepare_device(sys.argv[1:])
