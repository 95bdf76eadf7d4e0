"""Megatron settings that need an optional package, compared with what is installed.

Megatron switches on fusions that need a package, and fails from inside a layer where it is absent.
The rules are those of megatron-core 0.19.2. Imports neither torch nor megatron, so that a launcher
can ask which flags to add.
"""

from argparse import Namespace
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.util import find_spec
from typing import NamedTuple

from megatron_llr.errors import input_error

Installed = Callable[[str], bool]
"""Whether a package or extension can be imported, by the name of its module."""

ENGINE = "transformer_engine"
_NO_ENGINE = "Transformer Engine is not installed"
_GRADIENTS = "fused_weight_gradient_mlp_cuda"
_SOFTMAX = ("scaled_masked_softmax_cuda", "scaled_upper_triang_masked_softmax_cuda")
_LAYER_NORM = "fused_layer_norm_cuda"
# Extensions of apex; one that was built for another PyTorch cannot be imported.
_EXTENSIONS = (_GRADIENTS, *_SOFTMAX, _LAYER_NORM)


def installed(module: str) -> bool:
    """Whether a package is there; an extension of apex is imported to find out."""
    if find_spec(module) is None:
        return False
    if module not in _EXTENSIONS:
        return True
    try:
        # Its libraries are those that an extension links to.
        import_module("torch")
        import_module(module)
    except ImportError:
        return False
    return True


class Fallback(NamedTuple):
    """Flags that turn off what cannot run, and why it cannot."""

    flags: tuple[str, ...]
    reason: str


def fallbacks(args: Namespace, has: Installed = installed) -> list[Fallback]:
    """Flags to add because a default of Megatron needs a package that is absent.

    Args:
        args: Megatron's flags as parsed, before `validate_args`.
        has: whether a module is installed.
    """
    engine = has(ENGINE)
    local = _local(args, has)
    rope = args.position_embedding_type == "rope" or args.use_rotary_position_embeddings
    rms = args.normalization == "RMSNorm"
    half = args.bf16 or args.fp16
    rows = (
        # ColumnParallelLinear.__init__; with any layers, the head is one.
        (
            args.gradient_accumulation_fusion and not has(_GRADIENTS),
            "--no-gradient-accumulation-fusion",
            f"apex's CUDA extension {_GRADIENTS} is not installed",
        ),
        # get_gpt_layer_with_transformer_engine_spec
        (local and args.transformer_impl == ENGINE, "--transformer-impl local", _NO_ENGINE),
        # TransformerConfig.__post_init__
        (
            args.apply_rope_fusion and rope and not args.multi_latent_attention and not engine,
            "--no-rope-fusion",
            _NO_ENGINE,
        ),
        # WrappedTorchNorm.__new__; apex has no RMSNorm here.
        (
            local and not args.no_persist_layer_norm and (rms or not has("apex")),
            "--no-persist-layer-norm",
            "local layers have no persistent norm",
        ),
        # FusedScaleMaskSoftmax.forward
        (
            local and args.masked_softmax_fusion and half and not all(map(has, _SOFTMAX)),
            "--no-masked-softmax-fusion",
            f"apex's CUDA extension {_SOFTMAX[0]} is not installed",
        ),
    )
    return [Fallback(tuple(flag.split()), reason) for wanted, flag, reason in rows if wanted]


def _local(args: Namespace, has: Installed) -> bool:
    """Whether the layers are Megatron's local ones, by choice or for lack of the other ones."""
    return args.transformer_impl == "local" or not has(ENGINE)


def _of_engine(args: Namespace) -> Iterator[str]:
    """Flags, with their values, that need Transformer Engine next to any layers."""
    for value, flag in (
        (args.fp8, "--fp8-format"),
        (args.fp4, "--fp4-format"),
        (args.hybrid_layer_pattern, "--hybrid-layer-pattern"),
    ):
        if value:
            yield f"{flag} {value}"
    for switched_on, flag in (
        (args.tp_comm_overlap, "--tp-comm-overlap"),
        (args.moe_permute_fusion, "--moe-permute-fusion"),
        (args.use_precision_aware_optimizer, "--use-precision-aware-optimizer"),
    ):
        if switched_on:
            yield flag


def _of_its_layers(args: Namespace, has: Installed) -> Iterator[str]:
    """Flags, with their values, that Megatron's local layers do not support on a GPU."""
    if args.context_parallel_size > 1:
        yield f"--context-parallel-size {args.context_parallel_size}"
    if args.multi_latent_attention:
        yield "--multi-latent-attention"
    if args.sequence_parallel and (args.normalization == "RMSNorm" or not has("apex")):
        yield "--sequence-parallel"


# Flag with its value -> module, package on PyPI, what to run.
_OTHERS: tuple[tuple[str, str, str, str], ...] = (
    *(
        (f"--optimizer {name}", "emerging_optimizers", "emerging-optimizers 0.2 or newer", "muon")
        for name in ("muon", "soap", "lion")
    ),
    ("--tokenizer-type HuggingFaceTokenizer", "transformers", "transformers", "hf"),
    ("--tokenizer-type TikTokenizer", "tiktoken", "tiktoken", ""),
    *(
        (f"--tokenizer-type {name}", "sentencepiece", "sentencepiece", "")
        for name in ("SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer")
    ),
)


def require_packages(args: Namespace, *, gpu: bool, has: Installed = installed) -> None:
    """Refuse, before anything is built, settings whose package is absent.

    Args:
        args: Megatron's flags as parsed, before `validate_args`.
        gpu: whether the job runs on CUDA. On a CPU the emulation replaces the fused layers.
        has: whether a module is installed.

    Raises:
        ValueError: naming the package and the flags that make the job start.
    """
    chosen = {f"--optimizer {args.optimizer}", f"--tokenizer-type {args.tokenizer_type}"}
    for flag, module, package, extra in _OTHERS:
        if flag in chosen and not has(module):
            command = f"'megatron-llr[{extra}]'" if extra else package
            raise input_error(
                f"{flag} needs the package {package}, which is not installed. Run pip install "
                f"{command}."
            )
    if not gpu:
        return
    _require_engine(args, has)
    _require_gpu_packages(args, has)
    needed = fallbacks(args, has)
    if needed:
        reasons = dict.fromkeys(each.reason for each in needed)
        flags = " ".join(word for each in needed for word in each.flags)
        raise input_error(
            f"Megatron's defaults do not work with the installed packages: {'; '.join(reasons)}. "
            f"Add {flags} to the command."
        )


def _require_engine(args: Namespace, has: Installed) -> None:
    of_layers = list(_of_its_layers(args, has))
    if not has(ENGINE):
        for flag in (*_of_engine(args), *of_layers):
            raise input_error(
                f"{flag} needs Transformer Engine, which is not installed. Run pip install "
                f"--no-build-isolation 'megatron-llr[te]', or leave {flag.split()[0]} out."
            )
    elif args.transformer_impl == "local":
        for flag in of_layers:
            raise input_error(
                f"{flag} is not supported by the layers of --transformer-impl local on a GPU. "
                f"Leave out --transformer-impl local or {flag.split()[0]}."
            )


def _require_gpu_packages(args: Namespace, has: Installed) -> None:
    if "M" in (args.hybrid_layer_pattern or "") and not has("mamba_ssm"):
        raise input_error(
            f"--hybrid-layer-pattern {args.hybrid_layer_pattern} has Mamba layers (M), which need "
            "the package mamba-ssm. It is not installed. Run pip install --no-build-isolation "
            "mamba-ssm causal-conv1d, or use a pattern without M."
        )
    if args.async_save and args.async_strategy == "nvrx" and not has("nvidia_resiliency_ext"):
        raise input_error(
            "--async-save with --async-strategy nvrx needs the package nvidia-resiliency-ext, "
            "which is not installed. Run pip install nvidia-resiliency-ext, or add "
            "--async-strategy mcore."
        )
    layer_norm = _local(args, has) and args.normalization == "LayerNorm"
    if layer_norm and has("apex") and not has(_LAYER_NORM):
        raise input_error(
            f"--normalization LayerNorm in local layers uses the installed apex, which lacks its "
            f"CUDA extension {_LAYER_NORM}. Build apex with it, uninstall apex, or use "
            "--normalization RMSNorm."
        )
