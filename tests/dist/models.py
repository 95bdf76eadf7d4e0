"""Small models of every kind that Megatron has, and the layouts that each is tried on.

`MODELS[name].flags` are Megatron's flags on top of the harness's own model; `MODELS[name].layouts`
are names in `LAYOUTS`. A model has the same losses on all of its layouts where its weights are the
same: there is no dropout, and the vocabulary is padded alike.
"""

import os
from dataclasses import dataclass

WORLD_SIZE = int(os.environ.get("WORLD_SIZE", "1"))

_TP2 = "--tensor-model-parallel-size 2"
_SP2 = f"{_TP2} --sequence-parallel"
_PP2 = "--pipeline-model-parallel-size 2"
_CP2 = "--context-parallel-size 2"
_EP2 = "--expert-model-parallel-size 2"
_ETP1 = "--expert-tensor-parallel-size 1"
_ETP2 = "--expert-tensor-parallel-size 2"
_ALL_TO_ALL = "--moe-token-dispatcher-type alltoall"
_DISTRIBUTED = "--use-distributed-optimizer"
_FOUR = "--global-batch-size 4"


@dataclass(frozen=True)
class ModelLayout:
    """Ranks that a layout fills, and its flags."""

    world_size: int
    flags: str


LAYOUTS = {
    "one": ModelLayout(1, ""),
    "dp2": ModelLayout(2, ""),
    "dp2-bf16": ModelLayout(2, f"{_DISTRIBUTED} --bf16"),
    "tp2": ModelLayout(2, _TP2),
    "tp2-sp": ModelLayout(2, _SP2),
    "pp2": ModelLayout(2, f"{_PP2} {_DISTRIBUTED}"),
    "pp2-uneven": ModelLayout(2, f"{_PP2} --decoder-first-pipeline-num-layers 1"),
    "pp2-counted": ModelLayout(
        2,
        f"{_PP2} --account-for-embedding-in-pipeline-split --account-for-loss-in-pipeline-split",
    ),
    # E embedding, t block, m multi-token prediction, L loss.
    "pp2-custom": ModelLayout(2, f"{_PP2} --pipeline-model-parallel-layout E|ttttL"),
    "pp2-custom-mtp": ModelLayout(2, f"{_PP2} --pipeline-model-parallel-layout Ettt|tmmL"),
    "vpp2": ModelLayout(2, f"{_PP2} --num-virtual-stages-per-pipeline-rank 2"),
    "vpp2-custom": ModelLayout(2, f"{_PP2} --pipeline-model-parallel-layout Et|t|tt|L"),
    "cp2": ModelLayout(2, _CP2),
    "ep2": ModelLayout(2, _EP2),
    "ep2-alltoall": ModelLayout(2, f"{_EP2} {_ALL_TO_ALL}"),
    "tp2-sp-etp1": ModelLayout(2, f"{_SP2} {_ETP1}"),
    "tp2-sp-ep2": ModelLayout(2, f"{_SP2} {_EP2} {_ETP1}"),
    "dp4": ModelLayout(4, _FOUR),
    "tp4": ModelLayout(4, f"{_FOUR} --tensor-model-parallel-size 4"),
    "tp2-sp-pp2": ModelLayout(4, f"{_FOUR} {_SP2} {_PP2}"),
    "tp2-sp-cp2": ModelLayout(4, f"{_FOUR} {_SP2} {_CP2} {_DISTRIBUTED}"),
    "pp4-mtp-alone": ModelLayout(
        4,
        f"{_FOUR} --pipeline-model-parallel-size 4 --pipeline-model-parallel-layout Ett|tt|mm|L",
    ),
    "ep4": ModelLayout(4, f"{_FOUR} --expert-model-parallel-size 4"),
    "ep2-etp2": ModelLayout(4, f"{_FOUR} {_EP2} {_ETP2}"),
    "pp2-ep2": ModelLayout(4, f"{_FOUR} {_PP2} {_EP2}"),
    "tp2-sp-ep2-etp1-distopt": ModelLayout(4, f"{_FOUR} {_SP2} {_EP2} {_ETP1} {_DISTRIBUTED}"),
    "tp2-sp-ep2-etp2-alltoall": ModelLayout(4, f"{_FOUR} {_SP2} {_EP2} {_ETP2} {_ALL_TO_ALL}"),
}


@dataclass(frozen=True)
class Model:
    """Megatron's flags, the layouts it is tried on, and whether its head is its embedding."""

    flags: str
    layouts: tuple[str, ...]
    tied: bool = False

    def here(self) -> list[str]:
        """Names of its layouts that fill this launch; the first has every matrix whole."""
        return [name for name in self.layouts if LAYOUTS[name].world_size == WORLD_SIZE]


_COMPARABLE = "--hidden-dropout 0 --attention-dropout 0 --make-vocab-size-divisible-by 64"

_EXPERTS = (
    "--num-experts 4 --moe-ffn-hidden-size 64 --moe-router-topk 2 --moe-aux-loss-coeff 1e-2 "
    "--moe-token-dispatcher-type allgather"
)
_LATENT_ATTENTION = (
    "--multi-latent-attention --kv-lora-rank 64 --qk-head-dim 32 --qk-pos-emb-head-dim 16 "
    "--v-head-dim 32"
)
_MAMBA = "--mamba-state-dim 16 --mamba-head-dim 32 --mamba-num-groups 2"


def _model(flags: str, layouts: str, tied: bool = False) -> Model:
    return Model(f"{_COMPARABLE} {flags}".strip(), tuple(layouts.split()), tied)


# Hybrid patterns: M Mamba, * attention, + latent attention, - MLP, E experts; after a slash the
# layers of each step of multi-token prediction. Every pipeline stage has an E where any has one:
# Megatron 0.19.2 logs their losses with collectives of unequal size otherwise.
MODELS = {
    "dense": _model(
        "",
        "one dp2 dp2-bf16 tp2 tp2-sp pp2-uneven pp2-counted pp2-custom vpp2 vpp2-custom cp2 "
        "dp4 tp2-sp-pp2 tp2-sp-cp2",
    ),
    # One key and one value for all heads: most tensor-parallel ranks hold nothing of them.
    "mqa": _model("--num-query-groups 1 --kv-channels 64", "one dp2 tp2 dp4 tp4"),
    "tied": _model("", "one dp2 dp2-bf16 tp2-sp pp2 vpp2 cp2", tied=True),
    "moe": _model(
        _EXPERTS,
        "one dp2 dp2-bf16 tp2-sp pp2-custom tp2-sp-etp1 tp2-sp-ep2 vpp2 cp2 ep2 ep2-alltoall "
        "dp4 ep4 ep2-etp2 pp2-ep2 tp2-sp-ep2-etp1-distopt tp2-sp-ep2-etp2-alltoall",
    ),
    # The gate is a matrix of one row; every second block is dense.
    "moe-shared": _model(
        f"{_EXPERTS} --moe-shared-expert-intermediate-size 96 --moe-shared-expert-gate "
        "--moe-layer-freq ([0,1]*2)",
        "one dp2 dp2-bf16 tp2-sp pp2 vpp2 cp2 ep2 ep2-alltoall",
    ),
    "moe-latent": _model(
        f"{_EXPERTS} --moe-latent-size 64", "one dp2 dp2-bf16 tp2-sp pp2 cp2 ep2 ep2-alltoall"
    ),
    "mla": _model(_LATENT_ATTENTION, "one dp2 dp2-bf16 tp2 tp2-sp pp2 pp2-uneven vpp2 cp2"),
    "mla-q-lora": _model(
        f"{_LATENT_ATTENTION} --q-lora-rank 64",
        "one dp2 dp2-bf16 tp2-sp pp2 vpp2 cp2 dp4 tp2-sp-pp2",
    ),
    # As DeepSeek's: latent attention, a dense block first, experts, one of them shared.
    "mla-moe-mtp": _model(
        f"{_LATENT_ATTENTION} --q-lora-rank 64 {_EXPERTS} --mtp-num-layers 1 "
        "--moe-shared-expert-intermediate-size 96 --num-layers 2 --moe-layer-freq [0,1]",
        "one dp2 dp2-bf16 tp2-sp tp2-sp-ep2 pp2 cp2 ep2 ep2-alltoall dp4 pp2-ep2 ep2-etp2",
    ),
    "mtp": _model(
        "--mtp-num-layers 2",
        "one dp2 dp2-bf16 tp2-sp pp2 pp2-custom-mtp vpp2 cp2 dp4 pp4-mtp-alone",
    ),
    "hybrid": _model(
        f"{_EXPERTS} {_MAMBA} --hybrid-layer-pattern ME-*EM",
        "one dp2 dp2-bf16 tp2-sp pp2 cp2 ep2 ep2-alltoall dp4 tp2-sp-pp2 tp2-sp-ep2-etp1-distopt",
    ),
    "hybrid-mla": _model(
        f"{_LATENT_ATTENTION} --hybrid-layer-pattern +-+-", "one dp2 dp2-bf16 tp2-sp pp2 cp2"
    ),
    "hybrid-mtp": _model(
        f"{_MAMBA} --hybrid-layer-pattern M-*-/*-/*-", "one dp2 dp2-bf16 tp2-sp pp2 cp2"
    ),
}
