"""Choose where a job runs, before anything imports megatron."""

import sys
from collections.abc import Sequence
from typing import get_args

import torch

from megatron_llr.errors import input_error
from megatron_llr.megatron.packages import check_transformer_engine
from megatron_llr.script_config import DeviceName

_FLAG = "--llr-device"

# Fused kernels and NCCL need a GPU. So does NVIDIA's checkpoint writer for --async-save
# (nvidia-resiliency-ext); Megatron's own does not.
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
    """`cuda` or `cpu`, from `--llr-device` on the command line; auto takes a GPU if there is one.

    Raises:
        ValueError: if the flag has another value, or is cuda on a machine without a GPU.
    """
    device = "auto"
    for position, argument in enumerate(arguments):
        if argument == _FLAG:
            device = arguments[position + 1] if position + 1 < len(arguments) else ""
        elif argument.startswith(_FLAG + "="):
            device = argument.removeprefix(_FLAG + "=")
    if device not in get_args(DeviceName):
        raise input_error(
            f"{_FLAG} {device or 'without a value'} is not valid. It must be one of "
            f"{', '.join(get_args(DeviceName))}."
        )
    has_gpu = torch.cuda.is_available()
    if device == "cuda" and not has_gpu:
        raise input_error(
            f"{_FLAG} cuda needs a GPU, and torch sees none on this machine. Use {_FLAG} cpu or "
            "auto here, or run on a machine where nvidia-smi lists a GPU."
        )
    return ("cuda" if has_gpu else "cpu") if device == "auto" else device


def prepare_device(arguments: list[str]) -> list[str]:
    """Prepare this process for the device that a command line selects.

    On a CPU this enables the emulation of CUDA and puts the flags that it needs before the user's
    own, so that an explicit flag still has priority. Call before megatron is imported.

    Args:
        arguments: the command line without the program's name.

    Returns:
        The arguments for Megatron's parser.

    Raises:
        ValueError: see `wanted_device`; also if Transformer Engine is only partially installed.
    """
    check_transformer_engine()
    if wanted_device(arguments) == "cuda":
        return arguments
    from megatron_llr.cpu import emulation

    emulation.enable()
    return [*CPU_FLAGS, *arguments]


def on_gpu() -> bool:
    """Whether `prepare_device` chose CUDA in this process."""
    return "megatron_llr.cpu.emulation" not in sys.modules


def main_arguments() -> None:
    """`prepare_device` on this process's own command line."""
    sys.argv[1:] = prepare_device(sys.argv[1:])
