"""Megatron's models on its layouts: all of them train, and agree on losses and on multipliers.

The weights of a model are those of one layout, brought to the others by Megatron's own checkpoint
code: what the catalog says of where a matrix lies is checked against what Megatron says.
"""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from harness import Run, train
from megatron.core import dist_checkpointing

from megatron_llr import host
from megatron_llr.ranks import gather_objects
from tests.dist.models import LAYOUTS, MODELS
from tests.reference import llr as reference


def _state(run: Run) -> dict[str, object]:
    """Every chunk's part of one checkpoint, whichever layout it has."""
    return {
        f"model{index}": host.unwrap_model(chunk).sharded_state_dict()
        for index, chunk in enumerate(run.model)
    }


def _save(run: Run, folder: Path) -> None:
    dist_checkpointing.save(_state(run), str(folder))


def _start_from(folder: Path) -> Callable[[Run], None]:
    def load(run: Run) -> None:
        loaded = dist_checkpointing.load(_state(run), str(folder))
        for index, chunk in enumerate(run.model):
            host.unwrap_model(chunk).load_state_dict(loaded[f"model{index}"])
        run.optimizer.reload_model_params()

    return load


@pytest.mark.world_size(2, 4)
@pytest.mark.parametrize("name", [name for name, model in MODELS.items() if model.here()])
def test_every_layout_of_a_model_does_what_whole_weights_do(name: str, shared_dir: Path) -> None:
    """Invariant 2: exponents and multipliers are those that one process finds on whole weights."""
    model = MODELS[name]
    weights: dict[str, torch.Tensor] = {}
    first, *others = model.here()

    def run(layout: str, on_built: Callable[[Run], None]) -> Run:
        flags = ("--train-iters 3 --lr 4e-4 --min-lr 4e-5", model.flags, LAYOUTS[layout].flags)
        return train(*flags, tied=model.tied, on_built=on_built)

    def start(run: Run) -> None:
        weights.update(run.whole_weights())
        _save(run, shared_dir)

    whole = run(first, start)
    alphas, multipliers = reference.multipliers(weights, 1.0, 5.0, ("embedding", "head"))
    assert whole.alphas == pytest.approx(alphas, rel=1e-5)
    assert whole.multipliers == pytest.approx(multipliers, rel=1e-5)
    assert len(whole.losses) == 3
    assert all(abs(loss - math.log(256)) < 0.5 for loss in whole.losses)
    for other in others:
        found = run(other, _start_from(shared_dir))
        told = gather_objects((found.alphas, found.multipliers))
        assert all(rank == told[0] for rank in told), other
        assert found.alphas == pytest.approx(alphas, rel=1e-5), other
        assert found.multipliers == pytest.approx(multipliers, rel=1e-5), other
        losses = found.losses
        # Adam's first updates are the signs of gradients: rounding flips some that are next to 0.
        assert losses[:2] == pytest.approx(whole.losses[:2], abs=1e-5), other
        assert losses[2] == pytest.approx(whole.losses[2], abs=5e-4), other
