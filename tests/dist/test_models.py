"""Megatron's own models and layouts without the extension: that all of them train, and agree.

What the other tests say of the extension they say on these runs.
"""

import math
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from harness import Run, train
from megatron.core import dist_checkpointing

from megatron_llr import host
from megatron_llr.ranks import gather_objects
from megatron_llr.training.arguments import refuse_unsupported
from tests.dist.models import LAYOUTS, MODELS


def _state(run: Run) -> dict[str, object]:
    """Every chunk's part of one checkpoint, whichever layout it has."""
    return {
        f"model{index}": host.unwrap_model(chunk).sharded_state_dict()
        for index, chunk in enumerate(run.model)
    }


def _start_of(folder: Path) -> Callable[[Run], None]:
    def save(run: Run) -> None:
        dist_checkpointing.save(_state(run), str(folder))

    return save


def _start_from(folder: Path) -> Callable[[Run], None]:
    def load(run: Run) -> None:
        loaded = dist_checkpointing.load(_state(run), str(folder))
        for index, chunk in enumerate(run.model):
            host.unwrap_model(chunk).load_state_dict(loaded[f"model{index}"])
        run.optimizer.reload_model_params()

    return load


@pytest.mark.world_size(2, 4)
@pytest.mark.parametrize("name", [name for name, model in MODELS.items() if model.here()])
def test_every_layout_of_a_model_gives_the_losses_of_whole_weights(
    name: str, shared_dir: Path
) -> None:
    model = MODELS[name]
    first, *others = model.here()

    def run(layout: str, on_built: Callable[[Run], None]) -> Run:
        flags = ("--train-iters 3", model.flags, LAYOUTS[layout].flags)
        return train(*flags, llr=False, tied=model.tied, on_built=on_built)

    whole = run(first, _start_of(shared_dir))
    assert len(whole.losses) == 3
    assert all(abs(loss - math.log(256)) < 0.5 for loss in whole.losses)
    for other in others:
        losses = run(other, _start_from(shared_dir)).losses
        # Adam's first updates are the signs of gradients: rounding flips some that are next to 0.
        assert losses[:2] == pytest.approx(whole.losses[:2], abs=1e-5), other
        assert losses[2] == pytest.approx(whole.losses[2], abs=5e-4), other


@pytest.mark.world_size(2)
def test_experts_that_talk_under_the_backward_pass_learn_the_same() -> None:
    """--overlap-moe-expert-parallel-comm asks the script for plans in place of forward passes."""
    flags = f"{MODELS['moe'].flags} {LAYOUTS['ep2-alltoall'].flags} --bf16 --train-iters 3"
    # Four microbatches: one step's passes overlap.
    flags += " --global-batch-size 8"
    plain = train(flags, llr=False)
    assert train(flags, "--overlap-moe-expert-parallel-comm", llr=False).losses == plain.losses


@pytest.mark.world_size(2)
def test_losses_of_experts_and_of_further_tokens_are_logged(shared_dir: Path) -> None:
    """By Megatron, from what the script hands it; on a stage in the middle too."""
    flags = f"{MODELS['moe'].flags} --mtp-num-layers 1 --train-iters 3 --tensorboard-dir {shared_dir}"
    train(flags, "--pipeline-model-parallel-size 2", llr=False)

    def values_of(tag: str) -> list[float]:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(shared_dir))
        events.Reload()
        return [point.value for point in events.Scalars(tag)]

    dist.barrier()
    # Balanced experts have a load balancing loss of 1.
    for tag, least, most in (("load_balancing_loss", 0.9, 2.5), ("mtp_1 loss", 5.0, 6.0)):
        values = gather_objects(values_of(tag) if dist.get_rank() == 0 else [])[0]
        assert len(values) == 3
        assert all(least < value < most for value in values), (tag, values)


@pytest.mark.world_size(2)
def test_parts_of_unequal_size_are_gathered_and_summed() -> None:
    rank = dist.get_rank()
    gathered = [torch.empty(1, 2), torch.empty(3, 2)]
    dist.all_gather(gathered, torch.full((1 + 2 * rank, 2), float(rank)))
    assert torch.equal(torch.cat(gathered), torch.tensor([[0.0, 0], [1, 1], [1, 1], [1, 1]]))
    parts = [torch.full((1, 2), 1.0 + rank), torch.full((3, 2), 10.0 + rank)]
    mine = torch.empty_like(parts[rank])
    dist.reduce_scatter(mine, parts)
    assert torch.equal(mine, torch.full((1 + 2 * rank, 2), 21.0 if rank else 3.0))


@pytest.mark.world_size(1)
@pytest.mark.parametrize(
    ("setting", "flag", "reason"),
    [
        ({"use_megatron_fsdp": True}, "--use-megatron-fsdp", "layer groups do not read DTensors"),
        ({"use_torch_fsdp2": True}, "--use-torch-fsdp2", "layer groups do not read DTensors"),
        ({"gtp_weight_remat_size": 2}, "--gtp-weight-remat-size", "no rank has the weights"),
        ({"experimental_attention_variant": "dsa"}, "--experimental-attention-variant", "no matrix"),
        ({"hybrid_context_parallel": True}, "--hybrid-context-parallel", "packed sequences"),
    ],
)
def test_what_is_refused_is_named_with_its_reason(
    setting: dict[str, object], flag: str, reason: str
) -> None:
    refuse_unsupported(Namespace(llr_fixed_validation=False))
    with pytest.raises(ValueError, match=f"{flag} is not supported yet: .*{reason}"):
        refuse_unsupported(Namespace(llr_fixed_validation=False, **setting))
