"""Stands for the GPU package mamba-ssm: what Megatron's MambaMixer trains with, in plain torch.

The state space layer of Mamba-2 in its quadratic form (arXiv 2405.21060, section 3): with L_ij the
product of the decays between positions j and i, y = (L ∘ C Bᵀ) (dt x) + D x. Sequences of tests are
short; there are no chunks.
"""

from typing import Any

import torch
from torch.nn.functional import conv1d, silu, softplus

mamba_chunk_scan_combined: Any = None
"""Imported by Megatron beside the other, for inference."""


def mamba_split_conv1d_scan_combined(
    projected: torch.Tensor,
    conv_weight: torch.Tensor,
    conv_bias: torch.Tensor,
    dt_bias: torch.Tensor,
    decay: torch.Tensor,
    *,
    D: torch.Tensor,  # noqa: N803
    chunk_size: int,
    activation: str,
    headdim: int,
    ngroups: int,
    norm_before_gate: bool,
    seq_idx: None,
) -> torch.Tensor:
    """Convolution, state space layer and gate.

    Args:
        projected: [batch, sequence, z x B C dt].
        conv_weight: [channels of x B C, width].
        conv_bias: [channels of x B C].
        dt_bias: [heads].
        decay: [heads], negative.
        D: [heads], weight of the input in the output.
        chunk_size: of the GPU's kernel; the result does not depend on it.
        activation: silu.
        headdim: channels of a head.
        ngroups: groups of heads that share B and C.
        norm_before_gate: of the norm, which is not part of this.
        seq_idx: packed sequences, which are not there.

    Returns:
        [batch, sequence, heads * headdim].
    """
    assert activation == "silu"
    assert seq_idx is None
    heads, inner = len(decay), len(decay) * headdim
    states = (len(conv_weight) - inner) // 2
    gate, mixed, dt = projected.split([inner, inner + 2 * states, heads], -1)
    mixed = silu(causal_convolution(mixed, conv_weight, conv_bias))
    x, b, c = mixed.split([inner, states, states], -1)
    out = state_space(
        x.unflatten(-1, (heads, headdim)),
        softplus(dt + dt_bias),
        decay,
        *(
            part.unflatten(-1, (ngroups, -1)).repeat_interleave(heads // ngroups, 2)
            for part in (b, c)
        ),
    )
    out = out + D[:, None] * x.unflatten(-1, (heads, headdim))
    return out.flatten(-2).to(projected.dtype) * silu(gate)


def causal_convolution(
    mixed: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    """Each channel of [batch, sequence, channels] with its own weights, over past positions."""
    width = weight.shape[1]
    padded = torch.nn.functional.pad(mixed.transpose(1, 2), (width - 1, 0))
    return conv1d(padded, weight[:, None], bias, groups=len(weight)).transpose(1, 2)


def state_space(
    x: torch.Tensor, dt: torch.Tensor, decay: torch.Tensor, b: torch.Tensor, c: torch.Tensor
) -> torch.Tensor:
    """Output of the recurrence h_t = exp(dt_t decay) h_{t-1} + dt_t b_t xᵀ_t, y_t = c_t h_t.

    Args:
        x: [batch, sequence, heads, channels].
        dt: [batch, sequence, heads], positive.
        decay: [heads], negative.
        b: [batch, sequence, heads, state].
        c: [batch, sequence, heads, state].

    Returns:
        [batch, sequence, heads, channels].
    """
    total = torch.cumsum((dt.float() * decay), 1)
    between = total[:, :, None] - total[:, None]  # [batch, i, j, heads]
    past = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()[None, :, :, None]
    weights = torch.exp(between.masked_fill(~past, -torch.inf))
    weights = weights * torch.einsum("bihn,bjhn->bijh", c.float(), b.float())
    return torch.einsum("bijh,bjhp->bihp", weights, (dt[..., None] * x).float())
