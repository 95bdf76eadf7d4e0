"""Which optimizers, tensors and states the fused step takes, and why it refuses the others."""

import os
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import torch

from megatron_llr.config import flag
from megatron_llr.param_groups.adam_layout import MASTER, MOMENTS, AdamLayout, layout_of

_DTYPES = (torch.float32, torch.bfloat16)


def is_on_cuda(tensor: torch.Tensor) -> bool:
    """Whether a tensor is in the memory of a GPU.

    Asked of the tensor alone: on the CPU route `torch.cuda.is_available()` is true.
    """
    return tensor.is_cuda and tensor.device.type == "cuda"


def reason_unsupported(optimizer: torch.optim.Optimizer) -> str | None:
    """One sentence on why the fused way cannot step an optimizer's tensors, or None if it can.

    Decided by the tensors, by the param groups and by steps of a copy, never by class name.
    """
    found = layouts_of(optimizer)
    return found if isinstance(found, str) else None


def layouts_of(optimizer: Any) -> dict[torch.dtype, AdamLayout] | str:
    """What the optimizer computes for its tensors of every dtype, or why they are refused."""
    tensors = [tensor for group in optimizer.param_groups for tensor in group["params"]]
    reason = _reason_against_tensors(tensors) or _reason_against_groups(optimizer.param_groups)
    if reason is not None:
        return reason
    found: dict[torch.dtype, AdamLayout] = {}
    for dtype in _DTYPES:
        if any(tensor.dtype == dtype for tensor in tensors):
            layout = layout_of(optimizer, dtype, tensors[0].device)
            if isinstance(layout, str):
                return layout
            found[dtype] = layout
    return found


def _reason_against_tensors(tensors: Sequence[torch.Tensor]) -> str | None:
    if not tensors:
        return "it steps no tensor on this rank"
    if find_spec("triton") is None:
        return "triton is not installed"
    if not all(map(is_on_cuda, tensors)) and os.environ.get("TRITON_INTERPRET") != "1":
        return "its tensors are not on a CUDA device"
    if len({tensor.device for tensor in tensors}) > 1:
        return "its tensors are on several devices"
    for tensor in tensors:
        # A subclass (quantized, distributed) may keep its elements in another form.
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
            return f"it steps tensors of the class {type(tensor).__name__}"
        if tensor.dtype not in _DTYPES:
            return f"it steps {tensor.dtype} tensors"
        if not tensor.is_contiguous():
            return "it steps tensors that are not contiguous"
    return None


def _reason_against_groups(groups: Sequence[Mapping[str, Any]]) -> str | None:
    for group in groups:
        for name in ("lr", "weight_decay", "eps", "betas"):
            values = group.get(name)
            for value in values if isinstance(values, tuple | list) else (values,):
                if isinstance(value, torch.Tensor) and is_on_cuda(value):
                    return f"its {name} is a tensor on a CUDA device"
    return None


def takes_gradient(gradient: torch.Tensor | None) -> bool:
    """Whether the kernel reads such a gradient."""
    return gradient is None or (
        gradient.dtype in _DTYPES and gradient.layout is torch.strided and gradient.is_contiguous()
    )


def require_readable(tensor: torch.Tensor, state: Mapping[str, Any]) -> None:
    """The kernel gets addresses alone: what lies there has to be what it reads.

    Raises:
        RuntimeError: naming a state that is not contiguous fp32 memory of the tensor's size.
    """
    for key in (*MOMENTS, MASTER):
        value = state.get(key)
        if value is not None and not (
            value.dtype == torch.float32
            and value.numel() == tensor.numel()
            and value.is_contiguous()
            and value.device == tensor.device
        ):
            raise RuntimeError(
                f"megatron_llr: {key} of a {tuple(tensor.shape)} tensor is {value.dtype} of "
                f"{tuple(value.shape)} on {value.device}; the fused step needs contiguous fp32 "
                f"beside the tensor; set {flag('step')} grouped"
            )
