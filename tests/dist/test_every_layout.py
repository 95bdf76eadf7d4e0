"""Invariant 2 as a property: random small models, every layout that fits the ranks at hand.

The weights are those of `--llr-same-start`, drawn again by the reference, which knows of no layout.
"""

import os
from collections.abc import Iterator

import pytest
import torch.distributed as dist
from harness import Run, train
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from megatron_llr.ranks import gather_objects
from tests.reference import llr as reference
from tests.reference.models import Model

# A run takes about a second: more of them on request.
EXAMPLES = int(os.environ.get("LLR_EXAMPLES", "12"))


def _pipelines(model: Model, stages: int) -> Iterator[str]:
    """Ways to cut the layers over pipeline stages: evenly, virtually, unevenly, by a layout."""
    size = f"--pipeline-model-parallel-size {stages}"
    if stages == 1:
        yield ""
        return
    if model.pattern:
        if len(model.pattern) % stages == 0:
            yield size
        return
    if model.blocks % stages == 0:
        yield size
    if model.blocks % (2 * stages) == 0:
        yield f"{size} --num-virtual-stages-per-pipeline-rank 2"
    if stages == 2:
        if model.blocks > 2:
            yield f"{size} --decoder-first-pipeline-num-layers 1"
        if model.blocks > 1:
            last = "t" * (model.blocks - 1) + "m" * model.predictions + "L"
            yield f"{size} --pipeline-model-parallel-layout Et|{last}"


def fitting(model: Model, ranks: int, tensor: int) -> list[str]:
    """Flags of every layout of Megatron's that the model has on so many ranks.

    Args:
        model: the model.
        ranks: of the job.
        tensor: tensor-parallel size.
    """
    found = []
    for stages, context in ((p, c) for p in (1, 2, 4) for c in (1, 2)):
        mixers = model.mamba_groups if "M" in model.pattern else model.heads
        if ranks % (tensor * stages * context) or model.heads % tensor or mixers % tensor:
            continue
        flags = [f"--global-batch-size {2 * ranks}"]
        if tensor > 1:
            flags.append(f"--tensor-model-parallel-size {tensor}")
            # Megatron trains experts over tensor-parallel ranks with it alone.
            flags.append("--sequence-parallel" if model.experts else "")
        if context > 1:
            flags.append(f"--context-parallel-size {context}")
        for pipeline in _pipelines(model, stages):
            for experts in _expert_layouts(model, ranks // stages, tensor):
                found.append(" ".join([*flags, pipeline, experts]))
    return found


def _expert_layouts(model: Model, ranks: int, tensor: int) -> Iterator[str]:
    if not model.experts:
        yield ""
        return
    for parallel in (1, 2, 4):
        for expert_tensor in {1, tensor}:
            fits = ranks % (parallel * expert_tensor) == 0 and model.experts % parallel == 0
            if fits:
                yield (
                    f"--expert-model-parallel-size {parallel} "
                    f"--expert-tensor-parallel-size {expert_tensor}"
                )


# Every pipeline stage has experts where any has some: Megatron 0.19.2 logs their losses with
# collectives of unequal size otherwise.
PATTERNS = ("", "", "", "M-*-", "*--M", "ME*E", "*EME-EEM", "+-+-")


@st.composite
def models(draw: st.DrawFn) -> Model:
    """Widths of 64 and more, so that some matrices are measured; 48 is too small to be."""
    heads = draw(st.sampled_from([4, 8]))
    pattern = draw(st.sampled_from(PATTERNS))
    experts = draw(st.sampled_from([4, 8] if "E" in pattern else [0, 0, 4, 8]))
    experts = 0 if pattern and "E" not in pattern else experts
    latent_attention = draw(st.booleans()) if not pattern else "+" in pattern
    blocks = draw(st.integers(1, 4))
    shared = draw(st.sampled_from([0, 48, 96])) if experts else 0
    return Model(
        blocks=blocks,
        hidden=draw(st.sampled_from([64, 96, 128])),
        heads=heads,
        groups=draw(st.sampled_from([1, 2, heads])),
        # Wide enough that keys of few groups are measured.
        channels=draw(st.sampled_from([0, 64])),
        ffn=draw(st.sampled_from([64, 160, 192])),
        gated=draw(st.booleans()),
        tied=draw(st.booleans()),
        vocab=draw(st.sampled_from([128, 250])),
        experts=experts,
        expert_ffn=draw(st.sampled_from([48, 64, 96])),
        moe_every=draw(st.sampled_from([n for n in (1, 2) if blocks % n == 0])),
        shared=shared,
        shared_gate=bool(shared) and draw(st.booleans()),
        latent=draw(st.sampled_from([0, 0, 64])) if experts else 0,
        mla=latent_attention,
        q_lora=draw(st.sampled_from([0, 64])),
        kv_lora=draw(st.sampled_from([48, 64])),
        predictions=draw(st.sampled_from([0, 0, 1, 2])),
        pattern=pattern,
        prediction_pattern=("+" if latent_attention else "*") + ("E-" if experts else "-"),
    )


@st.composite
def jobs(draw: st.DrawFn) -> tuple[Model, str]:
    """A model, and a layout that it has on the ranks at hand."""
    model = draw(models())
    ranks = dist.get_world_size()
    # Its tensor parallelism first: most layouts have little of it.
    tensor = draw(st.sampled_from([size for size in (1, 2, 4) if fitting(model, ranks, size)]))
    layout = draw(st.sampled_from(fitting(model, ranks, tensor)))
    optimizer = draw(st.sampled_from(["", "--use-distributed-optimizer"]))
    return model, f"{layout} {optimizer} {draw(st.sampled_from(['', '--bf16']))}"


def measured(model: Model, layout: str) -> Run:
    """The model built on a layout, and measured once."""
    kept: list[Run] = []
    with pytest.raises(SystemExit):
        train(layout, "--llr-same-start --llr-dry-run", model=model.flags(), on_built=kept.append)
    return kept[0]


# Every rank must draw the same examples, as many; a search for a smaller one stops by the clock.
@settings(
    max_examples=EXAMPLES,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(jobs())
def test_multipliers_do_not_depend_on_the_layout(job: tuple[Model, str]) -> None:
    """Ids, shapes, exponents and multipliers are what one process finds on whole weights."""
    model, layout = job
    run = measured(model, layout)
    found = {m: (info.rows, info.columns) for m, info in run.controller.matrix_index.items()}
    told = gather_objects((found, run.alphas, run.multipliers))
    assert all(other == told[0] for other in told), "bit for bit on all ranks"
    assert found == model.matrices()
    weights = model.start()
    if "--bf16" in layout:
        weights = {matrix: weight.bfloat16().float() for matrix, weight in weights.items()}
    # A router with so many experts that it is measured is none of these models'.
    alphas, multipliers = reference.multipliers(weights, 1.0, 5.0, ("embedding", "head"))
    assert run.alphas == pytest.approx(alphas, rel=1e-5)
    assert run.multipliers == pytest.approx(multipliers, rel=1e-5)
