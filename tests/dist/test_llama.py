"""Against Hugging Face's LLaMA: exponents of a whole model, and 50 steps of training."""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import Run, train
from megatron.core import parallel_state as mpu
from megatron.core.utils import unwrap_model

from megatron_llr.megatron import batches as batch_module
from megatron_llr.megatron.catalog import build_catalog
from megatron_llr.ranks import gather_objects, together
from tests.reference import llama
from tests.reference import llr as reference

SHAPE = {"hidden": 128, "ffn": 192, "heads": 4, "groups": 2, "vocab": 256}
# No dropout, and a vocabulary that needs no padding on any layout.
CALM = "--attention-dropout 0 --hidden-dropout 0 --vocab-size 256"


def heavy_tailed(blocks: int) -> Any:
    """Random weights whose tails differ from matrix to matrix."""
    torch.manual_seed(11)
    model = llama.build(blocks=blocks, **SHAPE)
    with torch.no_grad():
        for index, parameter in enumerate(p for p in model.parameters() if p.ndim == 2):
            tails = torch.distributions.StudentT(2.2 + 0.35 * (index % 9))
            parameter.copy_(0.02 * tails.sample(parameter.shape))
    return model


def load_into(run: Run, model: Any, blocks: int) -> None:
    """Hugging Face weights into this rank's part of the Megatron model."""
    state = model.state_dict()
    names = llama.matrix_names(blocks)
    for shard in build_catalog(run.model).shards:
        whole = state[names[shard.matrix]]
        here = shard.placement
        columns = slice(here.first_column, here.first_column + here.columns)
        for span in here.spans:
            rows = whole[span.logical : span.logical + span.count, columns]
            shard.parameter.data[span.local : span.local + span.count] = rows
    if mpu.get_pipeline_model_parallel_world_size() == 1:
        parameters = dict(unwrap_model(run.model[0]).named_parameters())
        for ours, theirs in llama.norm_names(blocks).items():
            parameters[ours].data.copy_(state[theirs])
    run.optimizer.reload_model_params()


LAYOUTS = {
    1: {"tp1": ""},
    2: {"tp2": "--tensor-model-parallel-size 2", "pp2": "--pipeline-model-parallel-size 2"},
}


@pytest.mark.world_size(1, 2)
@pytest.mark.parametrize("name", ["tp1", "tp2", "pp2"])
def test_every_exponent_and_multiplier_is_the_papers(name: str) -> None:
    """One svdvals per Hugging Face matrix gives what Megatron's fused, sharded weights give."""
    layouts = LAYOUTS[dist.get_world_size()]
    if name not in layouts:
        pytest.skip("another world size")
    blocks = 4
    model = heavy_tailed(blocks)
    run = train(
        layouts[name],
        CALM,
        "--exit-interval 1",
        on_built=lambda built: load_into(built, model, blocks),
    )
    state = model.state_dict()
    weights = {matrix: state[name] for matrix, name in llama.matrix_names(blocks).items()}
    alphas, multipliers = reference.multipliers(weights, 1.0, 5.0, ("embedding", "head"))
    assert run.alphas == pytest.approx(alphas, rel=1e-5)
    measured = run.controller.state_dict()["schedule"]["new"]
    assert measured == pytest.approx(multipliers, rel=1e-5)
    # The tails differ, so a matrix taken for another would be found.
    assert len({round(alpha, 4) for alpha in alphas.values()}) > 20


@pytest.mark.world_size(1, 2)
def test_the_loaded_model_is_the_same_function() -> None:
    """The same logits: ids, fusion and sharding are what Megatron's forward takes them for."""
    layouts = LAYOUTS[dist.get_world_size()]
    model = heavy_tailed(2)
    tokens = torch.randint(256, (2, 16), generator=torch.Generator().manual_seed(3))
    found: list[torch.Tensor] = []

    def compare(built: Run) -> None:
        load_into(built, model, 2)
        positions = torch.arange(16).expand_as(tokens)
        mask = torch.ones(1, 1, 16, 16).triu(1).bool()
        with torch.no_grad():
            local = unwrap_model(built.model[0]).eval()(tokens, positions, mask)
        parts = gather_objects(local)
        found.append(torch.cat(parts, dim=-1) if local.shape[-1] < 256 else local)

    flags = "" if "tp1" in layouts else layouts["tp2"]
    train(flags, CALM, "--num-layers 2 --exit-interval 1", on_built=compare)
    with torch.no_grad():
        expected = model(tokens).logits
    assert torch.allclose(found[0], expected, atol=1e-4)


@contextlib.contextmanager
def recorded_batches(batches: list[tuple[int, Any, Any]]) -> Iterator[None]:
    """Keep the microbatches that this rank trains on, with its data-parallel rank.

    A pipeline stage that reads no tokens, or no labels, has None for them.
    """
    next_batch = batch_module._next_batch

    def keep(*args: Any) -> Any:
        batch = next_batch(*args)
        if batch["loss_mask"] is not None:
            assert float(batch["loss_mask"].min()) == 1.0
        kept = (None if batch[n] is None else batch[n].clone() for n in ("tokens", "labels"))
        batches.append((mpu.get_data_parallel_rank(), *kept))
        return batch

    batch_module._next_batch = keep
    try:
        yield
    finally:
        batch_module._next_batch = next_batch


@pytest.mark.world_size(1, 2, 3, 4, 6)
@pytest.mark.parametrize("tp", [1, 2])
def test_50_steps_are_those_of_separate_parameters(tp: int) -> None:
    """TP 1 and 2 with DP 1, 2 and 3: the weights of plain PyTorch with q, k, v, gate, up apart."""
    replicas, rest = divmod(dist.get_world_size(), tp)
    if rest or replicas > 3:
        pytest.skip("another world size")
    updates, blocks = 50, 2
    flags = f"--tensor-model-parallel-size {tp} --use-distributed-optimizer --num-layers {blocks} "
    flags += f"--global-batch-size 6 --train-iters {updates} --lr 1e-3 --lr-warmup-iters 5 "
    flags += "--log-interval 50 "
    flags += "--llr-interval 10 --llr-ramp-iters 5"
    model = heavy_tailed(blocks)
    rates: dict[int, tuple[float, dict[str, float]]] = {}
    batches: list[tuple[int, torch.Tensor, torch.Tensor]] = []

    def keep_rates(run: Run, update: int, done: bool) -> None:
        if not done:
            base = {group["lr"] for group in run.optimizer.param_groups}
            assert len(base) == 1
            rates[update] = (base.pop(), run.multipliers)

    with recorded_batches(batches):
        run = train(
            flags,
            CALM,
            on_built=lambda built: load_into(built, model, blocks),
            on_update=keep_rates,
        )
    trained = run.whole_weights(256)
    # Tensor-parallel ranks read the same batch: take each data-parallel rank's once.
    by_replica = {told[0][0]: told for told in gather_objects(batches)}
    assert len(by_replica) == replicas
    assert len({round(m, 3) for m in rates[updates][1].values()}) > 8

    def compare() -> None:
        each = 6 // replicas
        joined = []
        for update in range(updates):
            chosen = slice(update * each, (update + 1) * each)
            parts = [part for told in by_replica.values() for part in told[chosen]]
            joined.append((torch.cat([p[1] for p in parts]), torch.cat([p[2] for p in parts])))
        names = llama.matrix_names(blocks)
        llama.train(model, joined, rates.__getitem__, names, weight_decay=0.1, clip=1.0)
        state = model.state_dict()
        start = heavy_tailed(blocks).state_dict()
        for matrix, name in names.items():
            difference = float((trained[matrix] - state[name]).norm() / state[name].norm())
            moved = float((start[name] - state[name]).norm() / state[name].norm())
            assert difference <= 1e-5, (matrix, difference)
            assert moved > 0.01, (matrix, moved)

    together(lambda: compare() if dist.get_rank() == 0 else None)
