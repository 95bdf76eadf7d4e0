"""Weights that Transformer Engine keeps in fp8 (--fp8-param-gather), read as they are meant."""

import importlib
from typing import Any

import pytest
import torch
from transformer_engine.pytorch.tensor.float8_tensor import Float8Quantizer, Float8Tensor
from transformer_engine_torch import DType

from megatron_llr import analyze_matrix
from megatron_llr.matrices.ids import MatrixId
from megatron_llr.matrices.layout import Placement, Span
from megatron_llr.matrices.shard import MatrixShard
from megatron_llr.measurement.transfers import read_shard, read_weight
from megatron_llr.megatron.weight_names import INPUT


def quantised(weight: torch.Tensor) -> torch.nn.Parameter:
    """A parameter as Transformer Engine holds it with delayed scaling: one scale, E4M3."""
    scale = 448.0 / weight.abs().max()
    data = (weight * scale).to(torch.float8_e4m3fn).view(torch.uint8)
    quantizer = Float8Quantizer(
        scale=scale.view(1), amax=torch.zeros(1), fp8_dtype=DType.kFloat8E4M3
    )
    tensor = Float8Tensor(
        shape=weight.shape,
        dtype=torch.bfloat16,
        data=data,
        fp8_scale_inv=scale.reciprocal().view(1),
        fp8_dtype=DType.kFloat8E4M3,
        quantizer=quantizer,
        device="cpu",
    )
    return torch.nn.Parameter(tensor)


def shard_of(parameter: Any, spans: tuple[Span, ...], columns: int) -> MatrixShard:
    return MatrixShard(
        matrix=MatrixId.read("block.0.attention.q"),
        parameter_id="block.0.attention.qkv",
        initializer=INPUT,
        parameter=parameter,
        rows=sum(span.count for span in spans),
        columns=columns,
        placements=(Placement(spans, 0, columns),),
        ranks=(0,),
        group=None,
    )


def test_a_quantised_parameter_is_read_through_dequantisation() -> None:
    weight = torch.randn(96, 64, generator=torch.Generator().manual_seed(2)) * 0.02
    parameter = quantised(weight)
    assert isinstance(parameter, Float8Tensor)
    shard = shard_of(parameter, (Span(0, 0, 32), Span(64, 32, 32)), 64)
    plain = read_weight(shard)
    assert type(plain) is torch.Tensor
    assert plain.dtype == torch.bfloat16
    # E4M3 has three bits of mantissa: a relative step of 2^-3, half of it by rounding.
    assert float((plain.float() - weight).abs().max()) <= 0.0626 * float(weight.abs().max())
    assert torch.equal(read_shard(shard), torch.cat([plain[:32], plain[64:]]))


def test_its_exponent_is_near_that_of_the_weights() -> None:
    weight = torch.randn(256, 192, generator=torch.Generator().manual_seed(3)) * 0.02
    found = analyze_matrix(read_weight(shard_of(quantised(weight), (Span(0, 0, 256),), 192)))
    exact = analyze_matrix(weight)
    assert found.alpha_hill_median == pytest.approx(exact.alpha_hill_median, rel=2e-2)
    assert found.alpha_hill_median != exact.alpha_hill_median


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("float8_tensor", "Float8Tensor"),
        ("mxfp8_tensor", "MXFP8Tensor"),
        ("float8_blockwise_tensor", "Float8BlockwiseQTensor"),
        ("nvfp4_tensor", "NVFP4Tensor"),
    ],
)
def test_every_kind_of_quantised_tensor_is_dequantised(
    module: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The dispatch alone: the arithmetic of the newer kinds needs a GPU."""
    kinds = importlib.import_module(f"transformer_engine.pytorch.tensor.{module}")
    kind = getattr(kinds, name)
    parameter = torch.Tensor._make_wrapper_subclass(kind, (4, 6), dtype=torch.bfloat16)
    meant = torch.arange(24.0).view(4, 6)
    monkeypatch.setattr(kind, "detach", lambda self: self)
    monkeypatch.setattr(kind, "dequantize", lambda self: meant)
    assert torch.equal(read_shard(shard_of(parameter, (Span(1, 0, 2),), 6)), meant[1:3])
