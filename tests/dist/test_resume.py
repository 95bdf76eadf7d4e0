"""Invariants 3 and 4: checkpoints resume to the bit, on, off, and on another layout."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from harness import Run, train
from layouts import FORMATS, HERE, RESHARDED, Layout

# Iteration 5 lies inside the ramp that began at update 4. The run goes on to its end.
SAVE = "--save-interval 5"

SAVED = [
    pytest.param(layout, FORMATS[name], id=f"{layout}-{name}")
    for layout in HERE
    for name in layout.formats.split()
]
"""Layout x precision x optimizer x format: 10, 36 and 15 combinations at world sizes 1, 2, 4."""


def go_back(folder: Path, iteration: int = 5) -> str:
    """The flag that loads the checkpoint of an iteration, as if the run had ended before the next.

    Not --ckpt-step: of the distributed optimizer's state in the legacy format megatron-core 0.19.2
    loads the last checkpoint whatever that flag says.
    """
    if dist.get_rank() == 0:
        (folder / "latest_checkpointed_iteration.txt").write_text(str(iteration))
    dist.barrier()
    return f"--load {folder}"


def assert_continues(unbroken: Run, resumed: Run) -> None:
    """Losses, weights and state of the continued run are the unbroken run's, to the bit."""
    assert len(unbroken.losses) == 8
    assert resumed.losses == unbroken.losses[5:]
    weights = unbroken.parameters()
    for name, weight in resumed.parameters().items():
        assert torch.equal(weight, weights[name]), name
    assert resumed.controller.state_dict() == unbroken.controller.state_dict()


@pytest.mark.parametrize(("layout", "saved_as"), SAVED)
def test_a_resumed_run_is_the_unbroken_one(layout: Layout, saved_as: str, shared_dir: Path) -> None:
    """Invariant 3: stopped inside a ramp, multipliers, exponents and state go on to the bit."""
    unbroken = train(layout.flags, saved_as, f"--save {shared_dir} {SAVE}")
    resumed = train(layout.flags, saved_as, go_back(shared_dir))
    assert_continues(unbroken, resumed)


# Every kind of parallelism, precision and optimizer once or twice; three runs each.
SWITCHED = (
    "tp1 tp1-distopt-bf16 tp2 pp2-bf16 vpp2 dp2 dp2-distopt dp2-distopt-bf16 "
    "tp2-pp2-bf16 tp2-dp2-overlap-bf16"
).split()


@pytest.mark.parametrize("layout", [layout for layout in HERE if layout.name in SWITCHED], ids=str)
def test_the_extension_switches_on_and_off_at_any_checkpoint(
    layout: Layout, shared_dir: Path
) -> None:
    """Invariant 4: plain checkpoint -> on (ramped from 1), and back to plain Megatron."""
    # Every layout with one of its formats, so that all formats are met.
    names = layout.formats.split()
    flags = f"{layout.flags} {FORMATS[names[HERE.index(layout) % len(names)]]}"
    plain = train(flags, f"--save {shared_dir / 'plain'} {SAVE}", llr=False)
    on = train(
        flags,
        go_back(shared_dir / "plain"),
        f"--save {shared_dir / 'on'} --save-interval 7 --llr-active-fraction 0.5",
    )
    # Switched on at update 6 without state: a fraction counts from there, and the multipliers are
    # ramped to from 1, so that the loss before and after is that of the plain run.
    assert on.losses[0] == plain.losses[5]
    assert on.losses[1:] != plain.losses[6:]
    schedule = on.controller.state_dict()["schedule"]
    assert (schedule["start"], schedule["window_end"]) == (6, 8)
    off = train(flags, go_back(shared_dir / "on", 7), llr=False)
    assert off.losses == on.losses[2:]


@pytest.mark.world_size(2)
def test_megatron_cannot_load_its_own_fp32_distributed_optimizer(shared_dir: Path) -> None:
    """Unless it is saved fully reshardable: the loader writes into views of parameters outside
    no_grad. When this fails, layouts.py can name more formats.
    """
    flags = "--use-distributed-optimizer --exit-interval 5"
    train(flags, f"--save {shared_dir} {SAVE}", llr=False)
    with pytest.raises(RuntimeError, match="a view of a leaf Variable"):
        train(flags, f"--load {shared_dir}", llr=False)


@pytest.mark.parametrize(("before", "after"), RESHARDED)
def test_another_layout_goes_on_with_the_same_multipliers(
    before: str, after: str, shared_dir: Path
) -> None:
    """Invariant 3, resharded: the state is the same; only rounding in the loss may differ."""
    # Dropout draws other masks, and padding rows of the vocabulary take part in the softmax.
    calm = "--attention-dropout 0 --hidden-dropout 0 --vocab-size 256"
    unbroken = train(before, calm, f"--save {shared_dir} {SAVE}")
    resumed = train(after, calm, go_back(shared_dir))
    assert resumed.multipliers == unbroken.multipliers
    assert resumed.controller.state_dict() == unbroken.controller.state_dict()
    # Rounding; lost Adam state shows as a jump of several percent.
    tolerance = 1e-2 if "bf16" in before else 2e-3
    assert resumed.losses == pytest.approx(unbroken.losses[5:], rel=tolerance)


@pytest.mark.world_size(1)
def test_what_a_checkpoint_of_another_run_is_told(
    shared_dir: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Settings that give saved multipliers their meaning are refused; timing may change."""
    saved = train(f"--save {shared_dir} {SAVE} --exit-interval 5")
    load = f"--load {shared_dir} --exit-interval 6"
    with pytest.raises(ValueError, match="--llr-max-multiplier is ") as caught:
        train(load, "--llr-max-multiplier 3 --llr-mapping rank --llr-interval 5")
    told = str(caught.value)
    assert "--llr-mapping also differ. Set --llr-max-multiplier 5.0" in told
    assert "--llr-reset-state" in told
    capfd.readouterr()
    timing = "--llr-ramp-iters 1 --llr-interval 5 --llr-weight-decay decoupled --llr-active-iters 8"
    changed = train(load, timing)
    listed = [line for line in capfd.readouterr().out.splitlines() if "was" in line]
    assert listed == [
        "[llr] --llr-interval is 5, was 4 when the state was saved",
        "[llr] --llr-ramp-iters is 1, was 3 when the state was saved",
        "[llr] --llr-active-iters 8 has no effect (was None): the saved window, to update 6, is "
        "kept",
        "[llr] --llr-weight-decay is decoupled, was coupled when the state was saved",
    ]
    # The ramp that was under way goes on as it began, in the window that was saved.
    states = [run.controller.state_dict() for run in (changed, saved)]
    assert states[0]["schedule"] == states[1]["schedule"]
    assert states[0]["timing"]["active_iters"] is None
    reset = train(load, "--llr-max-multiplier 3 --llr-reset-state --llr-active-fraction 0.5")
    assert reset.controller.state_dict()["schedule"]["start"] == 6
    assert "was" not in capfd.readouterr().out


@pytest.mark.world_size(1)
def test_other_matrices_and_newer_versions_are_refused() -> None:
    """One line, naming what differs and the flag that mends it."""
    fresh = train("--exit-interval 1").controller
    document = fresh.state_dict()
    with pytest.raises(ValueError, match=r"has other matrices.*block\.9\.mlp\.up"):
        fresh.load_state_dict({**document, "matrices": [*document["matrices"], "block.9.mlp.up"]})
    with pytest.raises(ValueError, match=r"has version 3\. This package reads version 2"):
        fresh.load_state_dict({**document, "version": 3})


@pytest.mark.world_size(1)
def test_a_checkpoint_that_megatron_converts_keeps_the_state(shared_dir: Path) -> None:
    """--ckpt-convert-format saves before the controller has its state, and leaves."""
    saved = train(f"--save {shared_dir} {SAVE} --exit-interval 5 --ckpt-format torch")
    convert = f"--ckpt-convert-format torch_dist --ckpt-convert-save {shared_dir / 'other'}"
    with pytest.raises(SystemExit):
        train(go_back(shared_dir), f"--ckpt-format torch {convert}")
    resumed = train(go_back(shared_dir / "other" / "torch_dist"), "--exit-interval 6")
    state = resumed.controller.state_dict()
    assert state["schedule"] == saved.controller.state_dict()["schedule"]


@pytest.mark.world_size(1)
def test_a_longer_run_does_not_move_the_window(shared_dir: Path) -> None:
    train(f"--save {shared_dir} {SAVE} --exit-interval 5")
    longer = "--train-iters 16 --override-opt-param-scheduler --exit-interval 6"
    run = train(f"--load {shared_dir}", longer)
    assert run.controller.state_dict()["schedule"]["window_end"] == 6


@pytest.mark.world_size(1)
@pytest.mark.parametrize("flag", ["--finetune", "--no-load-optim"])
def test_without_the_schedulers_state_the_extension_starts_afresh(
    flag: str, shared_dir: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    train(f"--save {shared_dir} {SAVE} --exit-interval 5")
    capfd.readouterr()
    extra = "--no-load-rng --llr-active-fraction 0.5 --exit-interval 7"
    run = train(f"--load {shared_dir} {flag}", extra)
    line = "[llr] multipliers start from 1 at update 6: --no-load-optim loads neither Megatron's"
    assert (line in capfd.readouterr().out) is (flag == "--no-load-optim")
    start = run.controller.state_dict()["schedule"]["start"]
    # --finetune counts iterations from 0 again, --no-load-optim goes on counting.
    assert start == (1 if flag == "--finetune" else 6)
