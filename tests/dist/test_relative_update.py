"""The relative update in the log is that of the weights themselves, whole before and after."""

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import Run, train
from layouts import LAYOUTS, Layout
from megatron.core import parallel_state as mpu

from megatron_llr.megatron.stepped_tensors import leaf_optimizers, stepped_tensors_of
from megatron_llr.param_groups import grouped
from megatron_llr.ranks import together

NAMES = "tp1 tp1-bf16 tp2 pp2 dp2 dp2-bf16 dp2-distopt dp2-distopt-bf16"
CHOSEN = [layout for layout in LAYOUTS if layout.name in NAMES.split()]
FLAG = "--llr-log-relative-update --log-interval 4"


def stepped_weights(run: Run) -> dict[int, torch.nn.Parameter]:
    """What the optimizers step, in the shape of this rank's parameters: fp32, by id."""
    wholes = {
        id(parameter): torch.zeros(parameter.numel())
        for chunk in run.model
        for parameter in chunk.parameters()
    }
    for leaf in leaf_optimizers(run.optimizer):
        for master in stepped_tensors_of(leaf):
            whole = wholes[id(master.parameter)]
            whole[master.start : master.stop] = master.tensor.detach().view(-1)
    distributed = any(
        hasattr(leaf, "shard_fp32_from_float16_groups") for leaf in leaf_optimizers(run.optimizer)
    )
    found = {}
    for chunk in run.model:
        for parameter in chunk.parameters():
            whole = wholes[id(parameter)]
            if distributed:
                # Every element is in one replica's slice.
                dist.all_reduce(whole, group=mpu.get_data_parallel_group())
            found[id(parameter)] = torch.nn.Parameter(whole.view(parameter.shape))
    return found


class Oracle:
    """Relative updates from whole weights, for `on_update`."""

    def __init__(self) -> None:
        self.expected: dict[int, dict[str, float]] = {}
        self.skipped: list[int] = []
        self._before: dict[str, torch.Tensor] = {}
        self._update = 0

    def __call__(self, run: Run, update: int, done: bool) -> None:
        if not done:
            self._update = run.controller.next_update
        elif run.controller.next_update == self._update:
            self.skipped.append(self._update)
            return
        if self._update % 4:
            return
        whole = run.whole_weights(instead=stepped_weights(run))
        if not done:
            self._before = whole
        else:
            self.expected[self._update] = {
                matrix: float((weight - self._before[matrix]).double().norm() / weight.norm())
                for matrix, weight in whole.items()
            }


def logged(folder: Path) -> dict[int, dict[str, float]]:
    found: dict[int, dict[str, float]] = {}
    with (folder / "learning_rates.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            value = float(row["relative_update"])
            found.setdefault(int(row["iteration"]), {})[row["matrix"]] = value
    return found


def compare(folder: Path, oracle: Oracle, matrices: int) -> None:
    def check() -> None:
        if dist.get_rank() != 0:
            return
        found = logged(folder)
        assert sorted(found) == sorted(oracle.expected)
        assert len(found) >= 2
        for update, expected in oracle.expected.items():
            assert len(expected) == matrices
            assert min(expected.values()) > 1e-5
            assert found[update] == pytest.approx(expected, rel=1e-5, abs=0)

    dist.barrier()
    together(check)


@pytest.mark.parametrize("layout", CHOSEN, ids=str)
def test_it_is_the_change_of_the_whole_weights(layout: Layout, shared_dir: Path) -> None:
    """Multipliers from 1 to 5, weight decay, a vocabulary with padding rows."""
    if layout.world_size != dist.get_world_size():
        pytest.skip(f"needs world size {layout.world_size}")
    oracle = Oracle()
    run = train(layout.flags, FLAG, f"--llr-log-dir {shared_dir}", on_update=oracle)
    assert len(set(run.multipliers.values())) > 4
    compare(shared_dir, oracle, 4 * 7 + 2)


@pytest.mark.world_size(1, 2)
def test_a_tied_embedding_counts_once(shared_dir: Path) -> None:
    oracle = Oracle()
    flags = "--pipeline-model-parallel-size 2" if dist.get_world_size() == 2 else ""
    train(flags, FLAG, f"--llr-log-dir {shared_dir}", tied=True, on_update=oracle)
    compare(shared_dir, oracle, 4 * 7 + 1)


@pytest.mark.world_size(1)
@pytest.mark.parametrize("kind", ["uniform", "whole"])
def test_it_needs_no_layer_groups(kind: str, shared_dir: Path, monkeypatch: Any) -> None:
    """At multiplier 1, and with an optimizer that takes whole tensors alone."""
    if kind == "whole":
        monkeypatch.setattr(grouped, "stepping", lambda optimizer: "whole")
    policy = "--llr-policy uniform" if kind == "uniform" else ""
    oracle = Oracle()
    train(FLAG, policy, f"--llr-log-dir {shared_dir}", on_update=oracle)
    compare(shared_dir, oracle, 4 * 7 + 2)


@pytest.mark.world_size(1)
def test_a_skipped_step_is_no_update(shared_dir: Path) -> None:
    """The first try at update 4 overflows in fp16; the second is what is logged."""
    oracle = Oracle()
    scales: list[torch.Tensor] = []

    def overflow_once(run: Run, update: int, done: bool) -> None:
        oracle(run, update, done)
        scaler = next(leaf_optimizers(run.optimizer)).grad_scaler
        if update == 4 and not done:
            scales.append(scaler._scale.clone())
            scaler._scale.fill_(2.0**100)
        elif update == 4:
            scaler._scale.copy_(scales[0])

    flags = "--fp16 --initial-loss-scale 1024 --train-iters 12 --exit-interval 9"
    train(FLAG, flags, f"--llr-log-dir {shared_dir}", on_update=overflow_once)
    assert oracle.skipped == [4]
    compare(shared_dir, oracle, 4 * 7 + 2)


@pytest.mark.world_size(1)
def test_without_the_flag_nothing_is_recorded(shared_dir: Path) -> None:
    run = train(f"--llr-log-dir {shared_dir} --log-interval 4")
    assert all(inner.around_step is None for inner in run.controller._layer_groups._inner)
    with (shared_dir / "learning_rates.csv").open(newline="") as file:
        assert {row["relative_update"] for row in csv.DictReader(file)} == {""}
