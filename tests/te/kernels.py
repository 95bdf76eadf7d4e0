"""What Transformer Engine's CUDA kernels compute, in plain PyTorch, for its own FusedAdam on CPU.

Like the kernels (transformer_engine/common/multi_tensor/adam.cu) they see flat memory from a
tensor's first element on, whatever its strides.
"""

from typing import Any

import torch
from transformer_engine.pytorch.optimizers import FusedAdam


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    return torch.as_strided(tensor, (tensor.numel(),), (1,), tensor.storage_offset())


def _adam(
    lists: list[list[torch.Tensor]],
    masters: list[torch.Tensor],
    settings: tuple[Any, ...],
) -> None:
    """Step fp32 `masters` [flat] in place, with gradients and moments of the lists."""
    rate, beta1, beta2, eps, step, adam_w_mode, bias_correction, weight_decay = settings
    assert adam_w_mode == 1
    first = 1 - beta1**step if bias_correction else 1.0
    second = 1 - beta2**step if bias_correction else 1.0
    for master, g, m, v in zip(masters, lists[0], lists[2], lists[3], strict=True):
        gradient, mean, square = _flat(g).float(), _flat(m), _flat(v)
        mean.copy_(beta1 * mean.float() + (1 - beta1) * gradient)
        square.copy_(beta2 * square.float() + (1 - beta2) * gradient * gradient)
        update = (mean.float() / first) / ((square.float() / second).sqrt() + eps)
        master.sub_(rate * (update + weight_decay * master))


def multi_tensor_adam(
    chunk: int, overflow: torch.Tensor, lists: list[list[torch.Tensor]], *settings: Any
) -> None:
    """Weights, or with a fifth list fp32 masters and rounded weights."""
    weights = [_flat(weight) for weight in lists[1]]
    if len(lists) == 5:
        masters = [_flat(master) for master in lists[4]]
        _adam(lists, masters, settings)
    else:
        masters = [weight.float() for weight in weights]
        _adam(lists, masters, settings)
    for weight, master in zip(weights, masters, strict=True):
        weight.copy_(master)


def multi_tensor_adam_param_remainder(
    chunk: int, overflow: torch.Tensor, lists: list[list[torch.Tensor]], *settings: Any
) -> None:
    """fp32 masters kept as bf16 weights, rounded, and the 16 bits that rounding took away."""
    masters = []
    for weight, remainder in zip(lists[1], lists[4], strict=True):
        high = _flat(weight).view(torch.int16).int()
        low = _flat(remainder).int()
        high = torch.where(low < 0, high - 1, high)
        bits = (high << 16) | (low & 0xFFFF)
        masters.append(bits.view(torch.float32).clone())
    _adam(lists, masters, settings)
    for master, weight, remainder in zip(masters, lists[1], lists[4], strict=True):
        bits = master.view(torch.int32)
        low = (bits & 0xFFFF).to(torch.int16)
        high = (bits >> 16).to(torch.int16)
        high = torch.where(low < 0, high + 1, high).to(torch.int16)
        _flat(weight).copy_(high.view(torch.bfloat16))
        _flat(remainder).copy_(low)


class FusedAdamOnCPU(FusedAdam):  # type: ignore[misc]
    """Transformer Engine's FusedAdam, its own `step` included, with the kernels above."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.multi_tensor_adam = multi_tensor_adam
        self.multi_tensor_adam_param_remainder = multi_tensor_adam_param_remainder
