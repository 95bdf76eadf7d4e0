"""Weights that the catalog cannot place: named, refused, or trained at the base rate if asked."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import Run, train
from megatron.core.utils import unwrap_model
from torch.distributed.tensor import Replicate, distribute_tensor

from megatron_llr.megatron import weight_names
from megatron_llr.megatron.catalog import build_catalog
from megatron_llr.megatron.stepped_tensors import leaf_optimizers
from megatron_llr.ranks import gather_objects
from tests.reference import llr as reference

FLAGS = {1: "", 2: "--pipeline-model-parallel-size 2"}
STRANGER = "mlp.linear_fc2.weight"

pytestmark = pytest.mark.world_size(1, 2)


@pytest.fixture
def _without_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tables as they would be if nobody had heard of a model's weight."""
    monkeypatch.delitem(weight_names._BY_PATH, STRANGER)


@pytest.mark.usefixtures("_without_a_row")
def test_a_weight_that_no_table_places_is_named_and_refused() -> None:
    with pytest.raises(ValueError, match="--llr-skip-unknown") as caught:
        train(FLAGS[dist.get_world_size()])
    assert f"decoder.layers.0.{STRANGER} (128, 192)" in str(caught.value)
    told = gather_objects(str(caught.value))
    assert all(other == told[0] for other in told)


@pytest.mark.usefixtures("_without_a_row")
def test_skipped_it_is_trained_at_the_base_rate(capfd: pytest.CaptureFixture[str]) -> None:
    """Solved from the update itself; its neighbours keep multipliers of their own."""
    before: dict[str, torch.Tensor] = {}
    rates: dict[str, float] = {}

    def strangers(run: Run) -> dict[str, Any]:
        named = unwrap_model(run.model[0]).named_parameters()
        return {name: p for name, p in named if name.endswith(STRANGER)}

    def check(run: Run, update: int, done: bool) -> None:
        if update != 3:
            return
        for name, parameter in strangers(run).items():
            if not done:
                before[name] = parameter.detach().clone()
                continue
            inner = next(
                leaf.optimizer
                for leaf in leaf_optimizers(run.optimizer)
                if parameter in leaf.optimizer.state
            )
            found = reference.adamw_rate_of(inner, parameter, before[name])
            rates[name] = float(found.median())

    run = train(
        FLAGS[dist.get_world_size()], "--llr-skip-unknown --exit-interval 3", on_update=check
    )
    base = reference.cosine(3, warmup=2, total=8, peak=2e-3, low=2e-4)
    assert len(rates) == 4 // dist.get_world_size()
    assert all(rate == pytest.approx(base, rel=1e-3) for rate in rates.values())
    assert not any(matrix.endswith("down") for matrix in run.multipliers)
    assert max(m for matrix, m in run.multipliers.items() if "mlp.up" in matrix) > 1
    if dist.get_rank() == 0:
        assert f"multiplier 1: decoder.layers.0.{STRANGER} (128, 192)" in capfd.readouterr().out


def test_weights_cut_in_other_ways_are_refused_by_the_flag_that_cuts_them() -> None:
    def spoil(run: Run) -> None:
        model = unwrap_model(run.model[0])
        layer = model.decoder.layers[0].self_attention
        layer.linear_proj.weight.is_gtp_weight_remat = True
        with pytest.raises(RuntimeError, match="--tensor-parallel-num-weight-shards 1"):
            build_catalog(run.model)
        layer.linear_proj.weight.is_gtp_weight_remat = False
        mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
        cut = distribute_tensor(layer.linear_proj.weight.detach(), mesh, [Replicate()])
        layer.linear_proj.weight = torch.nn.Parameter(cut)
        with pytest.raises(RuntimeError, match="--use-megatron-fsdp"):
            build_catalog(run.model)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(FLAGS[dist.get_world_size()], on_built=spoil)
