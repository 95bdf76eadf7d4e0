"""AdamH and MuonH: against plain code on every layout, and what they promise on their own."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import Run, train
from models import MODELS
from test_llama import CALM, heavy_tailed, load_into, recorded_batches
from test_relative_update import stepped_weights

from megatron_llr.matrices.ids import MatrixId
from megatron_llr.megatron.catalog import build_catalog
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
    batches: list[tuple[int, Any, Any]] = []

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
    # Of the ranks of a replica, the first pipeline stage has the tokens and the last the labels.
    everywhere = gather_objects(batches)
    tokens, labels = (
        {
            sent[0][0]: [batch[part] for batch in sent]
            for sent in everywhere
            if sent[0][part] is not None
        }
        for part in (1, 2)
    )
    assert len({round(m, 3) for m in rates[updates][2].values()}) > 8
    assert rates[updates][2]["head"] == 1.0

    def compare() -> None:
        each = 4 // len(tokens)
        joined = []
        for update in range(updates):
            chosen = slice(update * each, (update + 1) * each)
            inputs, targets = (
                torch.cat([part for replica in sorted(read) for part in read[replica][chosen]])
                for read in (tokens, labels)
            )
            joined.append((inputs, targets))
        names = llama.matrix_names(blocks)
        plain = [matrix for matrix in names if is_plain(matrix)]
        hyperball.train(model, joined, rates.__getitem__, names, plain, weight_decay=0.1, clip=1.0)
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
        f"{optimizer} {layout} --train-iters {updates} --num-layers 2 --log-interval 10",
        HYPERBALL,
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


RESUMED = {
    1: ["", "--optimizer muon"],
    2: [f"{_DISTRIBUTED} --bf16", f"{_TP2} --bf16", "--pipeline-model-parallel-size 2"],
}


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(flags, id=flags or "tp1", marks=pytest.mark.world_size(world))
        for world, listed in RESUMED.items()
        for flags in listed
    ],
)
def test_a_resume_inside_the_warm_up_is_the_unbroken_run(flags: str, shared_dir: Path) -> None:
    """Norms, rate and state to the bit; plain Megatron loads the checkpoint, and the reverse."""
    line = f"{flags} {HYPERBALL} --llr-hyperball-lr 0.02 --lr-warmup-iters 6 --num-layers 2"
    unbroken = train(line, f"--save {shared_dir / 'on'} --save-interval 5")
    resumed = train(line, f"--load {shared_dir / 'on'} --ckpt-step 5")
    assert resumed.losses == unbroken.losses[5:]
    weights = unbroken.parameters()
    for name, weight in resumed.parameters().items():
        assert torch.equal(weight, weights[name]), name
    document = resumed.controller.state_dict()
    assert document == unbroken.controller.state_dict()
    assert len(document["radii"]) == 2 * 7 + 1
    assert document["timing"]["hyperball_lr"] == 0.02
    plain = f"{flags} --lr-warmup-iters 6 --num-layers 2"
    off = train(plain, f"--load {shared_dir / 'on'} --ckpt-step 5", llr=False)
    assert off.losses[0] == unbroken.losses[5]
    assert off.losses[1:] != unbroken.losses[6:]


@pytest.mark.world_size(1)
def test_switched_on_at_a_plain_checkpoint_it_keeps_the_norms_of_that_point(
    shared_dir: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    plain = train(f"--save {shared_dir} --save-interval 5 --exit-interval 5", llr=False)
    norms = {m: float(w.double().norm()) for m, w in plain.whole_weights().items()}
    run = train(f"{HYPERBALL} --load {shared_dir}")
    radii = run.controller.state_dict()["radii"]
    assert radii == pytest.approx({m: norms[m] for m in radii}, rel=1e-6)
    assert "the checkpoint has no norms, so those before update 6 are kept" in capfd.readouterr()[0]
    for matrix, weight in run.whole_weights().items():
        if not is_plain(matrix):
            assert float(weight.double().norm()) == pytest.approx(norms[matrix], rel=1e-6)


@pytest.mark.world_size(1, 2)
def test_a_matrix_that_starts_at_zero_stays_with_the_plain_optimizer(
    capfd: pytest.CaptureFixture[str],
) -> None:
    """By its norm before the first update, on every rank; the dry run names it."""
    layout = f"{_TP2} {_DISTRIBUTED}" if dist.get_world_size() == 2 else ""

    def zero(run: Run) -> None:
        for shard in build_catalog(run.model).shards:
            if shard.matrix in ("block.0.attention.o", "block.1.mlp.up"):
                for span in shard.placement.spans:
                    shard.parameter.data[span.local : span.local + span.count].zero_()
        run.optimizer.reload_model_params()

    line = f"{layout} {HYPERBALL} --num-layers 2 --train-iters 3"
    run = train(line, on_built=zero)
    weights = run.whole_weights()
    plain = {m for m, why in run.controller._plain.items() if why.startswith("zero")}
    # The gate is in the same parameter as the up projection.
    assert plain == {"block.0.attention.o", "block.1.mlp.up", "block.1.mlp.gate"}
    for matrix in plain:
        assert weights[matrix].norm() > 0, matrix
    table = run.controller.describe().splitlines()
    (line,) = (row for row in table if row.startswith("block.0.attention.o "))
    assert "zero at the start" in line
    (line,) = (row for row in table if row.startswith("block.0.attention.q "))
    assert line.endswith("hyperball")
    (line,) = (row for row in table if row.startswith("embedding "))
    assert line.endswith("an embedding")


@pytest.mark.world_size(2)
def test_experts_on_two_ranks_move_as_on_one(shared_dir: Path) -> None:
    """Expert matrices are divided over other groups than dense ones."""
    moe = f"{MODELS['moe-shared'].flags} --llr-same-start {CALM} --train-iters 6 {HYPERBALL}"
    moe += f" {_DISTRIBUTED}"
    together_weights = train(moe).whole_weights(256)
    apart = train(f"{moe} --expert-model-parallel-size 2").whole_weights(256)
    assert any(".expert." in matrix for matrix in apart)
    for matrix, weight in apart.items():
        difference = (weight - together_weights[matrix]).norm() / together_weights[matrix].norm()
        assert float(difference) < 2e-5, matrix


@pytest.mark.world_size(1, 2)
def test_a_skipped_update_moves_nothing() -> None:
    """fp16 with a scale that overflows: no rank enters a step, and none waits for another."""
    flags = "--fp16 --initial-loss-scale 1048576 --hysteresis 1 --train-iters 12 --lr-decay-iters 8"
    flags += f" --llr-active-iters 6 --num-layers 2 {HYPERBALL}"
    if dist.get_world_size() == 2:
        flags += f" {_DISTRIBUTED}"
    before: dict[str, torch.Tensor] = {}
    skipped = 0

    def keep(run: Run, update: int, done: bool) -> None:
        nonlocal skipped
        weights = run.whole_weights(instead=stepped_weights(run))
        if done and run.controller.next_update == keep.next_update:  # type: ignore[attr-defined]
            skipped += 1
            assert all(torch.equal(weights[m], w) for m, w in before.items())
        before.clear()
        before.update(weights)
        keep.next_update = run.controller.next_update  # type: ignore[attr-defined]

    run = train(flags, on_update=keep)
    assert skipped >= 2
    radii = run.controller.state_dict()["radii"]
    for matrix, norm in radii.items():
        assert float(before[matrix].double().norm()) == pytest.approx(norm, rel=1e-6)


@pytest.mark.world_size(1)
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--llr-hyperball-lr 0.01", "--llr-hyperball-lr.*--llr-hyperball"),
        ("--llr-hyperball --llr-hyperball-lr 2", "--llr-hyperball-lr.*2.*below 1"),
        ("--llr-hyperball --llr-policy alphadecay", "--llr-policy.*alphadecay.*--llr-hyperball"),
    ],
)
def test_what_cannot_be_combined_is_said(flags: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        train(flags)
