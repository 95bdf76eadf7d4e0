"""Rebindings that let Megatron's start-up accept models that its training loop can train."""

import contextlib
from collections.abc import Iterator
from typing import Any

import megatron.core.transformer.transformer_block as transformer_block
import megatron.training.initialize as initialize
import torch
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.transformer.torch_norm import WrappedTorchNorm


@contextlib.contextmanager
def start_up(normalization: str) -> Iterator[None]:
    """Make two functions of Megatron's start-up work inside this context.

    `_warmup_jit_function` compiles SwiGLU on an activation as wide as its output, where training
    has twice that width. An odd --ffn-hidden-size cannot be halved; the last column is left out.

    Without Transformer Engine, the norm after the last block is apex's FusedLayerNorm as soon as
    apex is installed. It has no RMSNorm; torch's norm is used as in the blocks.

    Args:
        normalization: of the model, --normalization.
    """
    module: Any = initialize
    block: Any = transformer_block
    compiled, norm = module.bias_swiglu, block.LayerNormImpl

    def bias_swiglu(activation: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """[..., n] and [n] to [..., n // 2]."""
        even = activation.shape[-1] // 2 * 2
        if even < activation.shape[-1]:
            activation, bias = activation[..., :even], bias[..., :even]
        out: torch.Tensor = compiled(activation, bias)
        return out

    module.bias_swiglu = bias_swiglu
    if normalization == "RMSNorm" and not HAVE_TE:
        block.LayerNormImpl = WrappedTorchNorm
    try:
        yield
    finally:
        module.bias_swiglu, block.LayerNormImpl = compiled, norm
