"""The replacements of GPU packages in the multi-rank tests, against plain formulas."""

import pytest
import torch
from mamba_ssm.ops.triton.layernorm_gated import RMSNorm
from mamba_ssm.ops.triton.ssd_combined import causal_convolution, state_space


@pytest.fixture
def random() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def test_state_space_layer_is_the_recurrence(random: torch.Generator) -> None:
    batch, length, heads, channels, state = 2, 7, 3, 4, 5
    x = torch.randn(batch, length, heads, channels, generator=random)
    dt = torch.rand(batch, length, heads, generator=random)
    decay = -torch.rand(heads, generator=random)
    b = torch.randn(batch, length, heads, state, generator=random)
    c = torch.randn(batch, length, heads, state, generator=random)
    h = torch.zeros(batch, heads, state, channels)
    expected = []
    for t in range(length):
        step = dt[:, t, :, None, None]
        h = torch.exp(step * decay[:, None, None]) * h
        h = h + step * b[:, t, :, :, None] * x[:, t, :, None, :]
        expected.append((c[:, t, :, None, :] @ h)[:, :, 0])
    result = state_space(x, dt, decay, b, c)
    assert torch.allclose(result, torch.stack(expected, 1), atol=1e-5)


def test_convolution_is_causal(random: torch.Generator) -> None:
    mixed = torch.randn(1, 6, 2, generator=random)
    weight, bias = torch.randn(2, 4, generator=random), torch.randn(2, generator=random)
    result = causal_convolution(mixed, weight, bias)
    for t in range(6):
        expected = bias.clone()
        for lag in range(min(4, t + 1)):
            expected += weight[:, 3 - lag] * mixed[0, t - lag]
        assert torch.allclose(result[0, t], expected, atol=1e-5)


def test_norm_is_per_group(random: torch.Generator) -> None:
    norm = RMSNorm(6, 1e-5, 3, False, "cpu", torch.float32)
    norm.weight.data = torch.arange(1.0, 7.0)
    hidden = torch.randn(2, 6, generator=random)
    first = torch.nn.functional.rms_norm(hidden[:, :3], (3,), norm.weight[:3], 1e-5)
    second = torch.nn.functional.rms_norm(hidden[:, 3:], (3,), norm.weight[3:], 1e-5)
    assert torch.allclose(norm(hidden), torch.cat([first, second], 1), atol=1e-6)
