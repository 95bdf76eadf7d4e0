"""Invariants 3 and 4: checkpoints resume to the bit, on, off, and on another layout."""

from pathlib import Path

import pytest
import torch
from harness import Run, train
from layouts import HERE, Layout

# Megatron-core 0.19.2 cannot load its own fp32 checkpoints of the distributed optimizer.
NOT_LOADABLE = [layout for layout in HERE if layout.name in ("dp2-distopt", "pp2-dp2-distopt")]
RESUMED = [
    layout for layout in HERE if layout.name not in ("tp1", "dp2") and layout not in NOT_LOADABLE
]

# Iteration 5 lies inside the ramp that began at update 4.
SAVE = "--save-interval 5 --exit-interval 5"


def save(folder: Path, *flags: str) -> str:
    return " ".join([f"--save {folder}", SAVE, *flags])


def assert_continues(unbroken: Run, resumed: Run) -> None:
    """Losses and weights of the continued run are the unbroken run's, to the bit."""
    assert resumed.losses == unbroken.losses[-len(resumed.losses) :]
    assert 0 < len(resumed.losses) < len(unbroken.losses)
    weights = unbroken.parameters()
    for name, weight in resumed.parameters().items():
        assert torch.equal(weight, weights[name]), name


@pytest.mark.parametrize("layout", RESUMED, ids=str)
def test_a_resumed_run_is_the_unbroken_one(layout: Layout, shared_dir: Path) -> None:
    """Invariant 3: stopped inside a ramp, multipliers, exponents and state go on to the bit."""
    unbroken = train(layout.flags)
    train(layout.flags, save(shared_dir))
    resumed = train(layout.flags, f"--load {shared_dir}")
    assert len(resumed.losses) == 3
    assert_continues(unbroken, resumed)
    assert resumed.controller.state_dict() == unbroken.controller.state_dict()


@pytest.mark.parametrize("layout", NOT_LOADABLE, ids=str)
def test_fp32_distributed_optimizer_cannot_be_loaded_by_plain_megatron_either(
    layout: Layout, shared_dir: Path
) -> None:
    """It writes into views of parameters outside no_grad. When this passes, the list above can
    go."""
    train(layout.flags, save(shared_dir), llr=False)
    with pytest.raises(RuntimeError, match="a view of a leaf Variable"):
        train(layout.flags, f"--load {shared_dir}", llr=False)


OTHER_LAYOUTS = [
    pytest.param(before, after, id=f"{before}-to-{after}")
    for before, after in (
        ("tp2", "pp2"),
        ("pp2", "tp2"),
        ("tp2-bf16", "pp2-bf16"),
        ("dp2", "tp2"),
        ("tp2-pp2", "tp4-split-groups"),
    )
    if {before, after} <= {layout.name for layout in HERE}
]


@pytest.mark.parametrize(("before", "after"), OTHER_LAYOUTS)
def test_another_layout_goes_on_with_the_same_multipliers(
    before: str, after: str, shared_dir: Path
) -> None:
    """Invariant 3, resharded: the state is the same; only rounding in the loss may differ."""
    # Dropout draws other masks, and padding rows of the vocabulary take part in the softmax.
    calm = " --attention-dropout 0 --hidden-dropout 0 --vocab-size 256"
    flags = {layout.name: layout.flags + calm for layout in HERE}
    saved = train(flags[before], save(shared_dir))
    resumed = train(flags[after], f"--load {shared_dir}", "--exit-interval 6")
    here = train(flags[before], f"--load {shared_dir}", "--exit-interval 6")
    assert resumed.multipliers == here.multipliers
    assert resumed.multipliers.keys() == saved.multipliers.keys()
    assert resumed.losses == pytest.approx(here.losses, rel=2e-3)


@pytest.mark.parametrize("layout", RESUMED, ids=str)
def test_the_extension_switches_on_and_off_at_any_checkpoint(
    layout: Layout, shared_dir: Path
) -> None:
    """Invariant 4: plain checkpoint -> on (ramped from 1), and back to plain Megatron."""
    plain = train(layout.flags, llr=False)
    train(layout.flags, save(shared_dir / "plain"), llr=False)
    on = train(
        layout.flags,
        f"--load {shared_dir / 'plain'} --save {shared_dir / 'on'}",
        "--save-interval 7 --exit-interval 7 --llr-active-fraction 0.5",
    )
    # Switched on at update 6 without state: the first update keeps the loss, a fraction counts
    # from there, and the multipliers are ramped to from 1.
    assert on.losses[0] == plain.losses[5]
    schedule = on.controller.state_dict()["schedule"]
    assert (schedule["start"], schedule["window_end"]) == (6, 8)
    assert set(schedule["old"].values()) == {1.0} or schedule["observed_at"] == 8
    off = train(layout.flags, f"--load {shared_dir / 'on'}", llr=False)
    assert len(off.losses) == 1
    assert all(loss == loss for loss in off.losses)


@pytest.mark.world_size(1)
def test_what_a_checkpoint_of_another_run_is_told(shared_dir: Path) -> None:
    """Settings that give saved multipliers their meaning are refused; timing may change."""
    train(save(shared_dir))
    load = f"--load {shared_dir} --exit-interval 6"
    with pytest.raises(ValueError, match="--llr-max-multiplier differs") as caught:
        train(load, "--llr-max-multiplier 3")
    assert "--llr-reset-state" in str(caught.value)
    changed = train(load, "--llr-ramp-iters 1")
    assert changed.multipliers == train(load).multipliers
    reset = train(load, "--llr-max-multiplier 3 --llr-reset-state --llr-active-fraction 0.5")
    assert reset.controller.state_dict()["schedule"]["start"] == 6


@pytest.mark.world_size(1)
def test_other_matrices_and_newer_versions_are_refused(shared_dir: Path) -> None:
    """One line, naming what differs and the flag that mends it."""
    run = train("--exit-interval 2")
    document = run.controller.state_dict()
    fresh = train("--exit-interval 1").controller
    with pytest.raises(ValueError, match="names other matrices.*block.9.mlp.up"):
        fresh.load_state_dict({**document, "matrices": [*document["matrices"], "block.9.mlp.up"]})
    with pytest.raises(ValueError, match="of a newer version: got 2; allowed: up to 1"):
        fresh.load_state_dict({**document, "version": 2})


@pytest.mark.world_size(1)
def test_a_longer_run_does_not_move_the_window(shared_dir: Path) -> None:
    train(save(shared_dir))
    longer = "--train-iters 16 --override-opt-param-scheduler --exit-interval 6"
    run = train(f"--load {shared_dir}", longer)
    assert run.controller.state_dict()["schedule"]["window_end"] == 6


@pytest.mark.world_size(1)
@pytest.mark.parametrize("flag", ["--finetune", "--no-load-optim"])
def test_without_the_schedulers_state_the_extension_starts_afresh(
    flag: str, shared_dir: Path
) -> None:
    train(save(shared_dir))
    extra = "--no-load-rng --llr-active-fraction 0.5 --exit-interval 7"
    run = train(f"--load {shared_dir} {flag}", extra)
    start = run.controller.state_dict()["schedule"]["start"]
    # --finetune counts iterations from 0 again, --no-load-optim goes on counting.
    assert start == (1 if flag == "--finetune" else 6)


@pytest.mark.world_size(2)
def test_a_fully_reshardable_checkpoint_goes_from_two_replicas_to_one(shared_dir: Path) -> None:
    """DP 2 to TP 2 (so DP 1) with the distributed optimizer: multipliers and Adam state go along."""
    flags = "--bf16 --use-distributed-optimizer --dist-ckpt-optim-fully-reshardable "
    flags += "--attention-dropout 0 --hidden-dropout 0 --vocab-size 256"
    replicas = train(flags, save(shared_dir))
    unbroken = train(flags)
    one = train(flags, "--tensor-model-parallel-size 2", f"--load {shared_dir}")
    assert one.controller.state_dict()["schedule"]["window_end"] == 6
    saved = replicas.controller.state_dict()
    assert one.controller.state_dict()["schedule"]["new"].keys() == saved["schedule"]["new"].keys()
    assert one.multipliers == pytest.approx(unbroken.multipliers, rel=1e-2)
    # Lost Adam state shows as a jump of several percent.
    assert one.losses == pytest.approx(unbroken.losses[-3:], rel=1e-2)
