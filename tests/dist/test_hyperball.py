"""AdamH and MuonH: against plain code on every layout, and what they promise on their own."""

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import Run, train
from test_llama import CALM, heavy_tailed, load_into, recorded_batches
from test_relative_update import stepped_weights

from megatron_llr.matrices.ids import MatrixId
from megatron_llr.ranks import gather_objects, together
from tests.reference import hyperball, llama

HYPERBALL = "--llr-hyperball --llr-interval 6 --llr-ramp-iters 3"
_TP2 = "--tensor-model-parallel-size 2"
_DISTRIBUTED = "--use-distributed-optimizer"
LAYOUTS = {
    1: {"tp1": "", "distributed": _DISTRIBUTED},
    2: {
        "tp2": _TP2,
        "tp2-distributed": f"{_TP2} {_DISTRIBUTED}",
        "pp2": "--pipeline-model-parallel-size 2",
        "dp2": "",
        "dp2-distributed": _DISTRIBUTED,
    },
    4: {"tp2-dp2-distributed": f"{_TP2} {_DISTRIBUTED}"},
}


def cases() -> list[Any]:
    """Every layout, with the world size that it fills."""
    return [
        pytest.param(flags, id=name, marks=pytest.mark.world_size(world))
        for world, layouts in LAYOUTS.items()
        for name, flags in layouts.items()
    ]


def is_plain(matrix: str) -> bool:
    """Whether the plain optimizer steps a matrix of a dense model that does not start at zero."""
    return matrix in ("embedding", "position_embedding")


@pytest.mark.parametrize("flags", cases())
def test_the_weights_are_those_of_plain_code(flags: str) -> None:
    """20 updates: W <- R N(W - eta m R N(u)) on separate parameters, in one process."""
    updates, blocks = 20, 2
    flags += f" --num-layers {blocks} --global-batch-size 4 --train-iters {updates} --lr 1e-3 "
    flags += f"--lr-warmup-iters 5 --log-interval 50 {HYPERBALL}"
    model = heavy_tailed(blocks)
    rates: dict[int, tuple[float, float, Mapping[str, float]]] = {}
    batches: list[tuple[int, torch.Tensor, torch.Tensor]] = []

    def keep_rates(run: Run, update: int, done: bool) -> None:
        if not done:
            (base,) = {group["lr"] for group in run.optimizer.param_groups}
            rates[update] = (base, base * 13 / 3, run.multipliers)

    with recorded_batches(batches):
        run = train(
            flags,
            CALM,
            on_built=lambda built: load_into(built, model, blocks),
            on_update=keep_rates,
        )
    trained = run.whole_weights(256)
    by_replica = {sent[0][0]: sent for sent in gather_objects(batches) if sent}
    assert len({round(m, 3) for m in rates[updates][2].values()}) > 8
    assert rates[updates][2]["head"] == 1.0

    def compare() -> None:
        each = 4 // len(by_replica)
        joined = []
        for update in range(updates):
            chosen = slice(update * each, (update + 1) * each)
            parts = [part for sent in by_replica.values() for part in sent[chosen]]
            joined.append((torch.cat([p[1] for p in parts]), torch.cat([p[2] for p in parts])))
        names = llama.matrix_names(blocks)
        plain = [matrix for matrix in names if is_plain(matrix)]
        hyperball.train(
            model, joined, rates.__getitem__, names, plain, weight_decay=0.1, clip=1.0
        )
        state = model.state_dict()
        start = heavy_tailed(blocks).state_dict()
        for matrix, name in names.items():
            difference = float((trained[matrix] - state[name]).norm() / state[name].norm())
            moved = float((start[name] - state[name]).norm() / state[name].norm())
            assert difference <= 2e-5, (matrix, difference)
            assert moved > 0.005, (matrix, moved)
            if not is_plain(matrix):
                ratio = float(trained[matrix].double().norm() / start[name].double().norm())
                assert ratio == pytest.approx(1.0, abs=1e-6), matrix

    together(lambda: compare() if dist.get_rank() == 0 else None)


@pytest.mark.world_size(1, 2)
@pytest.mark.parametrize("optimizer", ["", "--bf16", "--optimizer muon", f"--bf16 {_DISTRIBUTED}"])
def test_norms_are_constant_and_updates_are_what_the_formula_says(
    optimizer: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """100 updates: |W| to 1e-6; the logged relative update from rate, multiplier and cosine."""
    layout = _TP2 + " --num-query-groups 4" if dist.get_world_size() == 2 else ""
    if "muon" in optimizer and layout:
        layout += " --muon-tp-mode duplicated"
    updates = 20 if "muon" in optimizer else 100
    start: dict[str, torch.Tensor] = {}
    end: dict[str, torch.Tensor] = {}
    logged: dict[int, Any] = {}

    def keep(run: Run, update: int, done: bool) -> None:
        if update == updates and done:
            end.update(run.whole_weights(instead=stepped_weights(run)))
        if update == 1 and not done:
            start.update(run.whole_weights(instead=stepped_weights(run)))
            stepped = run.controller._observer.stepped

            def record(iteration: int, rates: Mapping[MatrixId, Any]) -> None:
                logged[iteration] = rates
                stepped(iteration, rates)

            run.controller._observer.stepped = record  # type: ignore[method-assign]

    folder = gather_objects(str(tmp_path_factory.mktemp("log")))[0]
    train(
        f"{optimizer} {layout} --train-iters {updates} --num-layers 2 --log-interval 10 {HYPERBALL}",
        f"--llr-log-relative-update --llr-log-dir {folder}",
        on_update=keep,
    )
    for matrix, weight in end.items():
        if not is_plain(matrix):
            ratio = float(weight.double().norm() / start[matrix].double().norm())
            assert ratio == pytest.approx(1.0, abs=1e-6), matrix
            assert not torch.equal(weight, start[matrix])
    if dist.get_rank() == 0:
        assert set(logged) == set(range(10, updates + 1, 10))
    for rates in logged.values():
        for matrix, rate in rates.items():
            assert rate.learning_rate == pytest.approx(
                rate.effective_learning_rate if not is_plain(matrix) else rate.learning_rate
            )
            if is_plain(matrix):
                assert rate.update_cosine is None
                continue
            step, c = rate.learning_rate, rate.update_cosine
            turned = math.atan2(step * math.sqrt(1 - c * c), 1 - step * c)
            expected = 2 * math.sin(turned / 2)
            assert rate.relative_update == pytest.approx(expected, rel=1e-5), matrix

