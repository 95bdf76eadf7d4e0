"""What is installed on a rank: versions, optional packages with all of their parts, GPU, NCCL."""

import importlib
import os
import platform
import shutil
import socket
import subprocess
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from typing import Any

from megatron_llr.errors import first_line
from megatron_llr.tools.self_test.layouts import EXPERTS, Layout
from megatron_llr.tools.self_test.results import spelled
from megatron_llr.version import __version__

# What --deterministic-mode needs before torch is imported; values that Megatron also accepts are
# kept (megatron/training/determinism.py).
_DETERMINISTIC = {
    "NCCL_ALGO": "Ring",
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    # Megatron compiles its fused activations at start; none of them is used here.
    "TORCHDYNAMO_DISABLE": "1",
}

_VERSIONS = (
    "torch",
    "megatron-core",
    "numpy",
    "triton",
    "transformer-engine",
    "apex",
    "flash-attn",
)


@dataclass(frozen=True)
class Part:
    """One importable part of an optional package.

    Attributes:
        package: name of the package.
        module: what is imported.
        flags: Megatron flags or features that need it.
        compiled: whether it has to be imported to know that it works.
    """

    package: str
    module: str
    flags: str
    compiled: bool = False


# Apex is built from source with the extensions that were asked for.
PARTS = (
    Part(
        "Transformer Engine",
        "transformer_engine.pytorch",
        "--transformer-impl transformer_engine, --fp8-format, --context-parallel-size and "
        "--multi-latent-attention on a GPU",
        compiled=True,
    ),
    Part("apex", "amp_C", "its FusedAdam, fused gradient norms", compiled=True),
    Part(
        "apex",
        "fused_weight_gradient_mlp_cuda",
        "gradient accumulation fusion (without it: --no-gradient-accumulation-fusion)",
        compiled=True,
    ),
    Part(
        "apex",
        "apex.normalization.fused_layer_norm",
        "--sequence-parallel with --transformer-impl local",
        compiled=True,
    ),
    Part("emerging-optimizers", "emerging_optimizers", "--optimizer muon, soap, lion"),
    Part("transformers", "transformers", "--tokenizer-type HuggingFaceTokenizer"),
    Part("nvidia-resiliency-ext", "nvidia_resiliency_ext", "--async-save on a GPU"),
    Part("triton", "triton", "the fused step of --llr-step on a GPU"),
)


def set_deterministic(environment: MutableMapping[str, str]) -> None:
    """Set the variables of deterministic kernels if unset. Call before torch is imported."""
    for name, value in _DETERMINISTIC.items():
        environment.setdefault(name, value)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        # apex built from source may have no metadata.
        return "unknown" if find_spec(package.replace("-", "_")) is not None else None


def _problem(part: Part, *, load: bool) -> str | None:
    """Why a part cannot be used; None if it can.

    Args:
        part: of an optional package.
        load: whether a compiled part is imported, which needs a GPU.
    """
    try:
        if find_spec(part.module) is None:
            return "not installed"
        if load and part.compiled:
            importlib.import_module(part.module)
    except ModuleNotFoundError as missing:
        # The outer package of the module, or a dependency of an installed one.
        outer = part.module.split(".")[0]
        return "not installed" if missing.name == outer else f"needs {missing.name}"
    except Exception as broken:  # extensions built for another torch fail in many ways
        return f"{type(broken).__name__}: {first_line(broken)}"
    return None


def _driver() -> str | None:
    """Version of the NVIDIA driver, from nvidia-smi."""
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.splitlines()[0] if done.stdout else None


def describe(device: str) -> dict[str, Any]:
    """Facts about this rank, as JSON values.

    Args:
        device: cuda or cpu.

    Returns:
        `software`, which must be equal on all ranks; `machine`; `missing`, per part of an optional
        package the reason and the flags that need it.
    """
    import torch

    software: dict[str, Any] = {"megatron-llr": __version__, "python": platform.python_version()}
    software |= {package: _version(package) for package in _VERSIONS}
    software["torch"] = torch.__version__
    machine: dict[str, Any] = {"host": socket.gethostname(), "system": platform.platform()}
    machine["variables"] = {name: os.environ.get(name) for name in _DETERMINISTIC}
    if device == "cuda":
        software["CUDA"] = torch.version.cuda
        software["cuDNN"] = torch.backends.cudnn.version()
        software["NCCL"] = ".".join(str(part) for part in torch.cuda.nccl.version())
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        machine["GPU"] = properties.name
        machine["memory"] = f"{properties.total_memory / 2**30:.0f} GiB"
        machine["compute capability"] = f"{properties.major}.{properties.minor}"
        machine["driver"] = _driver()
    missing = missing_parts(load=device == "cuda")
    return {"software": software, "machine": machine, "missing": missing}


def missing_parts(*, load: bool) -> list[dict[str, str]]:
    """Parts of optional packages that cannot be used: why, and the flags that need them.

    Args:
        load: whether compiled parts are imported, as on a GPU.
    """
    return [
        {"package": part.package, "part": part.module, "reason": reason, "needed for": part.flags}
        for part in PARTS
        if (reason := _problem(part, load=load)) is not None
    ]


def differences(facts: Sequence[Mapping[str, Any]]) -> list[str]:
    """Software that is not the same on all ranks, a line each.

    Args:
        facts: `describe` of every rank.
    """
    lines = []
    for name in facts[0]["software"]:
        values: dict[str, list[int]] = {}
        for rank, each in enumerate(facts):
            values.setdefault(str(each["software"].get(name)), []).append(rank)
        if len(values) > 1:
            parts = [f"{value} on {spelled(ranks)}" for value, ranks in values.items()]
            lines.append(f"{name} differs between ranks: {', '.join(parts)}")
    return lines


def unavailable(layout: Layout, facts: Mapping[str, Any], device: str) -> str | None:
    """Why a layout cannot run with what is installed; None if it can.

    Args:
        layout: one that fits the number of ranks.
        facts: `describe` of a rank.
        device: cuda or cpu.
    """
    missing = {each["part"] for each in facts["missing"]}
    engine = "transformer_engine.pytorch" not in missing
    if layout.fp8:
        if device == "cpu":
            return "FP8 needs a GPU"
        if not engine:
            return "FP8 needs Transformer Engine"
        capability: str = facts["machine"]["compute capability"]
        if tuple(int(number) for number in capability.split(".")) < (8, 9):
            return f"FP8 needs compute capability 8.9, this GPU has {capability}"
    if device == "cuda" and not engine:
        if layout.context > 1:
            return "--context-parallel-size needs Transformer Engine on a GPU"
        if layout.sequence and "apex.normalization.fused_layer_norm" in missing:
            return "--sequence-parallel needs Transformer Engine or apex on a GPU"
    return None


def device_flags(layout: Layout, facts: Mapping[str, Any], device: str) -> list[str]:
    """Flags of the layers that the installed packages allow.

    Fusions that need a further package are off, so that every set of packages runs the same checks.

    Args:
        layout: one that is available.
        facts: `describe` of a rank.
        device: cuda or cpu.
    """
    if device == "cpu":
        # `launch.prepare_device` adds what the CPU needs.
        return []
    plain = "--no-rope-fusion --no-bias-swiglu-fusion --no-bias-dropout-fusion "
    plain += "--no-gradient-accumulation-fusion"
    missing = {each["part"] for each in facts["missing"]}
    if "transformer_engine.pytorch" not in missing:
        grouped = " --moe-grouped-gemm" if layout.model == EXPERTS else ""
        return f"--transformer-impl transformer_engine {plain}{grouped}".split()
    local = "--no-masked-softmax-fusion --no-bias-gelu-fusion --no-persist-layer-norm"
    return f"--transformer-impl local {plain} {local}".split()
