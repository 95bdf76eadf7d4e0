"""Which optimizers, tensors and states the fused step supports, and the reasons if it does not."""

import os
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import torch

from megatron_llr.config import flag
from megatron_llr.param_groups.adam_layout import MASTER, MOMENTS, AdamLayout, layout_of

_DTYPES = (torch.float32, torch.bfloat16)


def is_on_cuda(tensor: torch.Tensor) -> bool:
    """Whether a tensor is in the memory of a GPU.

    Checks only the tensor, since `torch.cuda.is_available()` is true on the CPU route.
    """
    return tensor.is_cuda and tensor.device.type == "cuda"


def upload(source: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy of a CPU tensor on a device, on the current stream; the CPU does not wait for it."""
    target = torch.empty_like(source, device=device)
    upload_into(target, source)
    return target


def upload_into(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copy a CPU tensor to one on a device, on the current stream, as `upload`."""
    # torch reuses pinned memory only after the copies from it are complete.
    source = source.pin_memory() if is_on_cuda(target) else source
    target.copy_(source, non_blocking=True)


def is_readable_by_kernels(tensor: torch.Tensor) -> bool:
    """Whether kernels, which get only addresses, can read a tensor."""
    # A subclass (quantized, distributed) may store its elements in another form.
    return (
        type(tensor) in (torch.Tensor, torch.nn.Parameter)
        and tensor.dtype in _DTYPES
        and tensor.is_contiguous()
        and (is_on_cuda(tensor) or os.environ.get("TRITON_INTERPRET") == "1")
        and find_spec("triton") is not None
    )


def reason_unsupported(optimizer: torch.optim.Optimizer) -> str | None:
    """One sentence on why the fused step does not support an optimizer, or None if it does.

    Determined from the tensors, the param groups and steps of a copy, never from the class name.
    """
    layouts = layouts_of(optimizer)
    return layouts if isinstance(layouts, str) else None


def layouts_of(optimizer: Any) -> dict[torch.dtype, AdamLayout] | str:
    """The optimizer's computation for each dtype of its tensors, or why it is not supported."""
    tensors = [tensor for group in optimizer.param_groups for tensor in group["params"]]
    if not tensors:
        return "it steps no tensor on this rank"
    if find_spec("triton") is None:
        return "triton is not installed"
    if not all(map(is_on_cuda, tensors)) and os.environ.get("TRITON_INTERPRET") != "1":
        return "its tensors are not on a CUDA device"
    if len({tensor.device for tensor in tensors}) > 1:
        return "its tensors are on several devices"
    for tensor in tensors:
        # A subclass (quantized, distributed) may store its elements in another form.
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
            return f"it steps tensors of the class {type(tensor).__name__}"
        if tensor.dtype not in _DTYPES:
            return f"it steps {tensor.dtype} tensors"
        if not tensor.is_contiguous():
            return "it steps tensors that are not contiguous"
    for group in optimizer.param_groups:
        for name in ("lr", "weight_decay", "eps", "betas"):
            values = group.get(name)
            for value in values if isinstance(values, tuple | list) else (values,):
                if isinstance(value, torch.Tensor) and is_on_cuda(value):
                    return f"its {name} is a tensor on a CUDA device"
    layouts: dict[torch.dtype, AdamLayout] = {}
    for dtype in _DTYPES:
        if any(tensor.dtype == dtype for tensor in tensors):
            layout = layout_of(optimizer, dtype, tensors[0].device)
            if isinstance(layout, str):
                return layout
            layouts[dtype] = layout
    return layouts


def is_readable_gradient(gradient: torch.Tensor | None) -> bool:
    """Whether the kernel can read this gradient."""
    return gradient is None or (
        gradient.dtype in _DTYPES and gradient.layout is torch.strided and gradient.is_contiguous()
    )


def require_readable(tensor: torch.Tensor, state: Mapping[str, Any]) -> None:
    """Check the state of a tensor, of which the kernel gets only addresses.

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
                f"{tuple(value.shape)} on {value.device}. The fused step needs contiguous fp32 of "
                f"the same size on {tensor.device}. Set {flag('step')} grouped"
            )
