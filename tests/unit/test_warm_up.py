"""Megatron's warm-up of fused functions accepts odd FFN widths, and is restored afterwards."""

from types import SimpleNamespace

import pytest
import torch

from megatron_llr.megatron import launch

launch.prepare_device(["--llr-device", "cpu"])

import megatron.core.transformer.transformer_block as transformer_block  # noqa: E402
import megatron.training.initialize as initialize  # noqa: E402
from megatron.core.transformer.torch_norm import WrappedTorchNorm  # noqa: E402

from megatron_llr.megatron.warm_up import start_up  # noqa: E402


def arguments(width: int, ranks: int = 1) -> SimpleNamespace:
    return SimpleNamespace(
        bf16=True,
        fp16=False,
        ffn_hidden_size=width,
        tensor_model_parallel_size=ranks,
        context_parallel_size=1,
        seq_length=4,
        micro_batch_size=2,
        hidden_size=8,
        swiglu=True,
        sequence_parallel=False,
    )


@pytest.mark.parametrize(("width", "ranks"), [(5461, 1), (10922, 2), (5460, 1), (1, 1)])
def test_the_warm_up_runs_with_every_width(
    width: int, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(initialize, "get_args", lambda: arguments(width, ranks))
    original = initialize.bias_swiglu
    with start_up("RMSNorm"):
        initialize._warmup_jit_function(tp_size=ranks)
    assert initialize.bias_swiglu is original


def test_megatron_alone_fails_with_an_odd_width(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(initialize, "get_args", lambda: arguments(5461))
    with pytest.raises(RuntimeError, match=r"size of tensor a \(2731\)"):
        initialize._warmup_jit_function(tp_size=1)


def test_an_even_width_is_passed_on_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    given = []
    monkeypatch.setattr(initialize, "bias_swiglu", lambda *both: given.append(both) or both[0])
    activation, bias = torch.zeros(2, 6), torch.zeros(6)
    with start_up("RMSNorm"):
        initialize.bias_swiglu(activation, bias)
    assert given[0][0] is activation
    assert given[0][1] is bias


def test_the_last_norm_is_that_of_the_blocks_even_with_apex(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    of_apex = object()
    monkeypatch.setattr(transformer_block, "LayerNormImpl", of_apex)
    with start_up("RMSNorm"):
        assert transformer_block.LayerNormImpl is WrappedTorchNorm
    with start_up("LayerNorm"):
        assert transformer_block.LayerNormImpl is of_apex
    assert transformer_block.LayerNormImpl is of_apex
