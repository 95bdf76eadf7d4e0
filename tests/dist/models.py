"""Small models of every kind that Megatron has, and the layouts that each is tried on.

`MODELS[name].flags` are Megatron's flags on top of the harness's own model; `MODELS[name].layouts`
the names of layouts in `LAYOUTS`. The loss of a model is the same on all of its layouts where the
weights are: no dropout, and a vocabulary that is padded alike.
"""

import os
from dataclasses import dataclass

_TP2 = "--tensor-model-parallel-size 2"
_SP = f"{_TP2} --sequence-parallel"
_PP2 = "--pipeline-model-parallel-size 2"
_CP2 = "--context-parallel-size 2"
_EP2 = "--expert-model-parallel-size 2"
_ETP1 = "--expert-tensor-parallel-size 1"
_ALL_TO_ALL = "--moe-token-dispatcher-type alltoall"
_BF16_DISTRIBUTED = "--bf16 --use-distributed-optimizer"


@dataclass(frozen=True)
class ModelLayout:
    """Ranks that a layout fills, and its flags."""

    world_size: int
    flags: str


# The first of each world size holds every matrix whole on every rank.
LAYOUTS = {
    "one": ModelLayout(1, ""),
    "dp2": ModelLayout(2, ""),
    "tp2": ModelLayout(2, _TP2),
    "tp2-sp": ModelLayout(2, _SP),
    "pp2": ModelLayout(2, _PP2),
    "vpp2": ModelLayout(2, f"{_PP2} --num-virtual-stages-per-pipeline-rank 2"),
    "cp2": ModelLayout(2, _CP2),
    "ep2": ModelLayout(2, _EP2),
    "ep2-alltoall": ModelLayout(2, f"{_EP2} {_ALL_TO_ALL}"),
    "tp2-sp-ep2": ModelLayout(2, f"{_SP} {_EP2} {_ETP1}"),
    "dp4": ModelLayout(4, "--global-batch-size 4"),
}


@dataclass(frozen=True)
class Model:
    """Megatron's flags, and the names of the layouts that the model is tried on."""

    flags: str
    layouts: tuple[str, ...]

    def here(self) -> list[str]:
        """Names of the layouts that fill this launch."""
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        return [name for name in self.layouts if LAYOUTS[name].world_size == world_size]


_COMPARABLE = "--hidden-dropout 0 --attention-dropout 0 --make-vocab-size-divisible-by 64"

_EXPERTS = (
    "--num-experts 4 --moe-ffn-hidden-size 64 --moe-router-topk 2 --moe-aux-loss-coeff 1e-2 "
    "--moe-token-dispatcher-type allgather"
)
_LATENT_ATTENTION = (
    "--multi-latent-attention --kv-lora-rank 64 --qk-head-dim 32 --qk-pos-emb-head-dim 16 "
    "--v-head-dim 32"
)


def _model(flags: str, layouts: str) -> Model:
    return Model(f"{_COMPARABLE} {flags}".strip(), tuple(layouts.split()))


MODELS = {
    "dense": _model("", "one dp2 tp2 tp2-sp pp2 vpp2 cp2"),
    "moe": _model(_EXPERTS, "one dp2 tp2-sp pp2 vpp2 cp2 ep2 ep2-alltoall tp2-sp-ep2"),
    # The gate is a matrix of one row; every second block is dense.
    "moe-shared": _model(
        f"{_EXPERTS} --moe-shared-expert-intermediate-size 96 --moe-shared-expert-gate "
        "--moe-layer-freq ([0,1]*2)",
        "one dp2 tp2-sp pp2 ep2",
    ),
    "mla": _model(_LATENT_ATTENTION, "one dp2 tp2 tp2-sp pp2 cp2"),
    "mla-q-lora": _model(f"{_LATENT_ATTENTION} --q-lora-rank 64", "one dp2 tp2 tp2-sp"),
    "mtp": _model("--mtp-num-layers 2", "one dp2 tp2 tp2-sp pp2 vpp2 cp2"),
}
