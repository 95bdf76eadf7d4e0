"""Which flags are asked for where a package is absent, by Megatron's own parser and layers."""

import sys
from argparse import Namespace
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from megatron_llr.megatron import launch

launch.prepare_device(["--llr-device", "cpu"])

from megatron.core.fusions.fused_softmax import FusedScaleMaskSoftmax  # noqa: E402
from megatron.core.tensor_parallel import layers  # noqa: E402
from megatron.core.transformer.enums import AttnMaskType  # noqa: E402
from megatron.core.transformer.torch_norm import WrappedTorchNorm  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402
from megatron.training import arguments  # noqa: E402

from megatron_llr.megatron.flags import add_llr_arguments  # noqa: E402
from megatron_llr.megatron.launcher_flags import added_flags, build_parser  # noqa: E402
from megatron_llr.megatron.package_needs import fallbacks, require_packages  # noqa: E402

ENGINE = {"transformer_engine"}
GRADIENTS = {"fused_weight_gradient_mlp_cuda"}
APEX = GRADIENTS | {
    "apex",
    "scaled_masked_softmax_cuda",
    "scaled_upper_triang_masked_softmax_cuda",
    "fused_layer_norm_cuda",
}
LLAMA = "--bf16 --normalization RMSNorm --position-embedding-type rope"
NO_GRADIENTS = "--no-gradient-accumulation-fusion"


def having(*packages: str) -> Callable[[str], bool]:
    return lambda module: module in packages


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Namespace]:
    def parse(flags: str) -> Namespace:
        monkeypatch.setattr(sys, "argv", ["pretrain_gpt_llr.py", *flags.split()])
        args: Namespace = arguments.parse_args(add_llr_arguments)
        return args

    return parse


CASES = [
    (
        LLAMA,
        set(),
        f"{NO_GRADIENTS} --transformer-impl local --no-rope-fusion --no-persist-layer-norm "
        "--no-masked-softmax-fusion",
    ),
    (LLAMA, ENGINE, NO_GRADIENTS),
    (LLAMA, ENGINE | APEX, ""),
    # No apex has an RMSNorm for Megatron's local layers.
    (LLAMA, APEX, "--transformer-impl local --no-rope-fusion --no-persist-layer-norm"),
    # An apex with its optimizer only.
    (
        LLAMA,
        {"apex"},
        f"{NO_GRADIENTS} --transformer-impl local --no-rope-fusion --no-persist-layer-norm "
        "--no-masked-softmax-fusion",
    ),
    ("--bf16", APEX, "--transformer-impl local"),
    # The fused softmax is for 16 bits only, and there is no rope to fuse.
    ("", set(), f"{NO_GRADIENTS} --transformer-impl local --no-persist-layer-norm"),
    (
        f"{LLAMA} --transformer-impl local",
        ENGINE | GRADIENTS,
        "--no-persist-layer-norm --no-masked-softmax-fusion",
    ),
]


@pytest.mark.parametrize(("flags", "packages", "added"), CASES)
def test_the_launcher_and_the_script_name_the_same_flags(
    flags: str, packages: set[str], added: str, parsed: Callable[[str], Namespace]
) -> None:
    has = having(*packages)
    needed = [word for each in fallbacks(parsed(flags), has) for word in each.flags]
    assert " ".join(needed) == added
    words, _ = added_flags(flags.split(), round_ffn=True, has=has)
    assert words == needed
    if not added:
        require_packages(parsed(flags), gpu=True, has=has)
        return
    with pytest.raises(ValueError, match=f"Add {added} to the command") as refused:
        require_packages(parsed(flags), gpu=True, has=has)
    assert "\n" not in str(refused.value)
    # With these flags nothing is missing any more.
    require_packages(parsed(f"{flags} {added}"), gpu=True, has=has)
    require_packages(parsed(flags), gpu=False, has=has)


@pytest.mark.parametrize(
    ("flags", "packages", "message"),
    [
        ("--fp8-format hybrid", APEX, "--fp8-format hybrid needs Transformer Engine, which is not"),
        ("--fp4-format e2m1", set(), "--fp4-format e2m1 needs Transformer Engine"),
        ("--hybrid-layer-pattern *-", set(), r"--hybrid-layer-pattern \*- needs Transformer"),
        ("--context-parallel-size 2", set(), "or leave --context-parallel-size out"),
        (
            "--context-parallel-size 2 --transformer-impl local",
            ENGINE,
            "--context-parallel-size 2 is not supported by the layers of --transformer-impl local",
        ),
        ("--multi-latent-attention", set(), "--multi-latent-attention needs Transformer Engine"),
        ("--use-precision-aware-optimizer", set(), "needs Transformer Engine"),
        (f"{LLAMA} --sequence-parallel", APEX, "--sequence-parallel needs Transformer Engine"),
        ("--hybrid-layer-pattern M-", ENGINE, "pip install --no-build-isolation mamba-ssm"),
        ("--async-save", ENGINE, "add --async-strategy mcore"),
        ("", {"apex"}, "lacks its CUDA extension fused_layer_norm_cuda.*--normalization RMSNorm"),
        ("--optimizer muon", ENGINE, r"Run pip install 'megatron-llr\[muon\]'"),
        (
            "--tokenizer-type HuggingFaceTokenizer",
            ENGINE,
            r"transformers, which is not installed. Run pip install 'megatron-llr\[hf\]'",
        ),
        ("--tokenizer-type Llama2Tokenizer", ENGINE, "Run pip install sentencepiece"),
    ],
)
def test_a_setting_whose_package_is_absent_is_refused(
    flags: str, packages: set[str], message: str, parsed: Callable[[str], Namespace]
) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        require_packages(parsed(flags), gpu=True, has=having(*packages))
    assert "\n" not in str(refused.value)


def test_the_launcher_reads_the_flags_of_megatron() -> None:
    """Same names, defaults and meaning as in Megatron's own parser."""
    import argparse

    theirs = arguments.add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    known = theirs._option_string_actions
    for action in build_parser()._actions:
        (name,) = action.option_strings
        assert (known[name].dest, known[name].default) == (action.dest, action.default), name
        assert known[name].nargs == action.nargs, name


def test_fp8_widths_are_rounded_for_every_rank() -> None:
    has = having(*ENGINE, *APEX)
    flags = "--fp8-format hybrid --ffn-hidden-size 5461".split()
    for more, width in (
        ("", "5472"),
        ("--fp8-recipe mxfp8", "5472"),
        ("--tensor-model-parallel-size 4", "5504"),
        ("--fp8-recipe mxfp8 --tensor-model-parallel-size 2", "5504"),
    ):
        words, lines = added_flags([*flags, *more.split()], round_ffn=True, has=has)
        assert words == ["--ffn-hidden-size", width]
        assert f"--ffn-hidden-size 5461 is rounded up to {width}" in lines[-1]
    assert added_flags(flags, round_ffn=False, has=has) == ([], [])
    assert added_flags([*flags, "--ffn-hidden-size", "64"], round_ffn=True, has=has) == ([], [])


def test_megatron_fails_where_a_fallback_is_missing() -> None:
    """The rules are those of the installed Megatron, here without apex and Transformer Engine."""
    assert not layers._grad_accum_fusion_available
    norm = SimpleNamespace(
        layernorm_zero_centered_gamma=False, persist_layer_norm=True, normalization="RMSNorm"
    )
    with pytest.raises(AssertionError, match="persist_layer_norm not supported"):
        WrappedTorchNorm(norm, 8)
    size = {"num_layers": 1, "hidden_size": 64, "num_attention_heads": 4}
    with pytest.raises(ValueError, match="apply_rope_fusion is not available"):
        TransformerConfig(**size, apply_rope_fusion=True)
    softmax = FusedScaleMaskSoftmax(False, True, AttnMaskType.causal, True, None, True, None)
    with pytest.raises(ModuleNotFoundError, match="scaled_masked_softmax_cuda"):
        softmax(torch.zeros(1, 4, 32, 32, dtype=torch.bfloat16), None)
