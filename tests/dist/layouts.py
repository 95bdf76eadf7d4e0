"""The parallel layouts that tests run, each with the world size that it fills."""

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Layout:
    """A layout: name, world size, Megatron's flags."""

    name: str
    world_size: int
    flags: str

    def __str__(self) -> str:
        return self.name


_DISTRIBUTED = "--use-distributed-optimizer"
_OVERLAP = f"{_DISTRIBUTED} --overlap-grad-reduce --overlap-param-gather"
_TP2 = "--tensor-model-parallel-size 2"
_PP2 = "--pipeline-model-parallel-size 2"

LAYOUTS = (
    Layout("tp1", 1, ""),
    Layout("tp1-bf16", 1, "--bf16"),
    Layout("tp1-distopt-bf16", 1, f"--bf16 {_DISTRIBUTED}"),
    Layout("tp2", 2, _TP2),
    Layout("tp2-bf16", 2, f"{_TP2} --bf16"),
    Layout("tp2-mha-bias", 2, f"{_TP2} --num-query-groups 4 --add-qkv-bias"),
    Layout("pp2", 2, _PP2),
    Layout("pp2-bf16", 2, f"{_PP2} --bf16"),
    Layout("vpp2", 2, f"{_PP2} --num-virtual-stages-per-pipeline-rank 2"),
    Layout("dp2", 2, ""),
    Layout("dp2-bf16", 2, "--bf16"),
    Layout("dp2-distopt", 2, _DISTRIBUTED),
    Layout("dp2-distopt-bf16", 2, f"--bf16 {_DISTRIBUTED}"),
    Layout("dp2-overlap-bf16", 2, f"--bf16 {_OVERLAP}"),
    Layout("tp2-pp2", 4, f"{_TP2} {_PP2}"),
    Layout("tp2-pp2-bf16", 4, f"{_TP2} {_PP2} --bf16"),
    Layout("tp2-dp2-overlap-bf16", 4, f"{_TP2} --bf16 {_OVERLAP}"),
    Layout("tp4-split-groups", 4, "--tensor-model-parallel-size 4"),
    Layout("pp2-dp2-distopt", 4, f"{_PP2} {_DISTRIBUTED}"),
)

HERE = [
    layout for layout in LAYOUTS if layout.world_size == int(os.environ.get("WORLD_SIZE", "1"))
]
"""Those that fill the world size of this launch."""
