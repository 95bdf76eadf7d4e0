"""The parallel layouts that tests run, the world size that each fills, how each is saved."""

import os
from dataclasses import dataclass

import pytest

from tests.dist.models import MODELS


@dataclass(frozen=True)
class Layout:
    """A layout: name, world size, Megatron's flags, and the checkpoint formats that resume it."""

    name: str
    world_size: int
    flags: str
    formats: str

    def __str__(self) -> str:
        return self.name


# What --save writes, by Megatron's flags. `dist` is Megatron's default (with the distributed
# optimizer: dp-reshardable), `torch` its legacy format. The others of megatron-core 0.19.2,
# torch_dcp and fsdp_dtensor, are for the two FSDPs alone.
_ASYNC = "--async-save --use-persistent-ckpt-worker"
_FULLY = "--dist-ckpt-optim-fully-reshardable"
FORMATS = {
    "dist": "",
    "async": _ASYNC,
    "fully": _FULLY,
    "fully-async": f"{_FULLY} {_ASYNC}",
    "torch": "--ckpt-format torch",
}

_DISTRIBUTED = "--use-distributed-optimizer"
_OVERLAP = f"{_DISTRIBUTED} --overlap-grad-reduce --overlap-param-gather"
_TP2 = "--tensor-model-parallel-size 2"
_PP2 = "--pipeline-model-parallel-size 2"
_VPP2 = f"{_PP2} --num-virtual-stages-per-pipeline-rank 2"

_SP = f"{_TP2} --sequence-parallel"
_EP2 = "--expert-model-parallel-size 2"
_ETP1 = "--expert-tensor-parallel-size 1"
_CP2 = "--context-parallel-size 2"
_MOE, _MLA, _MTP, _HYBRID = (
    MODELS[name].flags for name in ("moe-shared", "mla-q-lora", "mtp", "hybrid")
)

_RESHARDABLE = f"--bf16 {_DISTRIBUTED} {_FULLY}"

_PLAIN = "dist async torch"
_SHARDED = "dist async fully fully-async torch"
# Megatron-core 0.19.2 cannot load what its distributed optimizer saves of fp32 weights in the
# other formats: see test_resume.py.
_SHARDED_FP32 = "fully fully-async"

LAYOUTS = (
    Layout("tp1", 1, "", _PLAIN),
    Layout("tp1-bf16", 1, "--bf16", "dist async"),
    Layout("tp1-distopt-bf16", 1, f"--bf16 {_DISTRIBUTED}", _SHARDED),
    Layout("tp2", 2, _TP2, _PLAIN),
    Layout("tp2-bf16", 2, f"{_TP2} --bf16", "dist async"),
    Layout("tp2-mha-bias", 2, f"{_TP2} --num-query-groups 4 --add-qkv-bias", "dist"),
    Layout("pp2", 2, _PP2, _PLAIN),
    Layout("pp2-bf16", 2, f"{_PP2} --bf16", "dist torch"),
    Layout("vpp2", 2, _VPP2, "dist async"),
    Layout("dp2", 2, "", "dist torch"),
    Layout("dp2-bf16", 2, "--bf16", "dist async"),
    Layout("dp2-distopt", 2, _DISTRIBUTED, _SHARDED_FP32),
    Layout("dp2-distopt-bf16", 2, f"--bf16 {_DISTRIBUTED}", _SHARDED),
    Layout("dp2-overlap-bf16", 2, f"--bf16 {_OVERLAP}", "async fully torch"),
    Layout("cp2", 2, _CP2, "dist"),
    Layout("ep2-moe", 2, f"{_EP2} {_MOE}", "dist"),
    Layout("ep2-moe-distopt-bf16", 2, f"{_EP2} {_MOE} --bf16 {_DISTRIBUTED}", "dist fully torch"),
    Layout("tp2-ep2-moe", 2, f"{_SP} {_EP2} {_ETP1} {_MOE}", "dist"),
    Layout("tp2-mla-bf16", 2, f"{_SP} {_MLA} --num-layers 2 --bf16", "dist"),
    Layout("pp2-mtp", 2, f"{_PP2} {_MTP}", "dist"),
    Layout("tp2-hybrid", 2, f"{_SP} {_HYBRID}", "dist"),
    Layout("tp2-pp2", 4, f"{_TP2} {_PP2}", "dist async"),
    Layout("tp2-pp2-bf16", 4, f"{_TP2} {_PP2} --bf16", "dist torch"),
    Layout("tp2-dp2-overlap-bf16", 4, f"{_TP2} --bf16 {_OVERLAP}", "dist async fully torch"),
    Layout("tp4-split-groups", 4, "--tensor-model-parallel-size 4", "dist"),
    Layout("pp2-dp2-distopt", 4, f"{_PP2} {_DISTRIBUTED}", _SHARDED_FP32),
    Layout("tp2-ep2-etp2-moe", 4, f"{_SP} {_EP2} {_MOE}", "dist"),
    Layout("pp2-ep2-moe-distopt-bf16", 4, f"{_PP2} {_EP2} {_MOE} --bf16 {_DISTRIBUTED}", "fully"),
    Layout("tp2-pp2-hybrid-distopt-bf16", 4, f"{_SP} {_PP2} {_HYBRID} {_RESHARDABLE}", "fully"),
    Layout("tp2-cp2-mla", 4, f"{_TP2} {_CP2} {_MLA} --num-layers 2", "dist"),
)

_WORLD_SIZE = int(os.environ.get("WORLD_SIZE", "1"))

HERE = [layout for layout in LAYOUTS if layout.world_size == _WORLD_SIZE]
"""Those that fill the world size of this launch."""


RESHARDED = [
    pytest.param(before, after, id=name)
    for world_size, name, before, after in (
        (2, "tp2-to-pp2", _TP2, _PP2),
        (2, "pp2-to-tp2", _PP2, _TP2),
        (2, "pp2-to-vpp2", _PP2, _VPP2),
        (2, "dp2-to-tp2", "", _TP2),
        (2, "tp2-to-pp2-bf16", f"{_TP2} --bf16", f"{_PP2} --bf16"),
        (2, "ep2-to-tp2-ep2-moe", f"{_EP2} {_MOE}", f"{_SP} {_EP2} {_ETP1} {_MOE}"),
        (2, "tp2-to-pp2-mla", f"{_TP2} {_MLA}", f"{_PP2} {_MLA}"),
        (2, "cp2-to-tp2", _CP2, _TP2),
        (2, "dp2-to-tp2-distopt", _RESHARDABLE, f"{_TP2} {_RESHARDABLE}"),
        (2, "tp2-to-vpp2-distopt", f"{_TP2} {_RESHARDABLE}", f"{_VPP2} {_RESHARDABLE}"),
        (4, "tp2-pp2-to-tp4", f"{_TP2} {_PP2}", "--tensor-model-parallel-size 4"),
        (4, "etp2-ep2-to-pp2-ep2-moe", f"{_SP} {_EP2} {_MOE}", f"{_PP2} {_EP2} {_MOE}"),
        (4, "tp2-dp2-to-pp2-dp2-distopt", f"{_TP2} {_RESHARDABLE}", f"{_PP2} {_RESHARDABLE}"),
    )
    if world_size == _WORLD_SIZE
]
"""(flags that save, flags that load) of this launch."""
