"""Flags of Megatron's scheduler, on resume and for the embedding, keep their meaning."""

from pathlib import Path

import pytest
from harness import Run, train

pytestmark = pytest.mark.world_size(1)

SAVE = "--save-interval 5 --exit-interval 5"
Settings = list[list[tuple[float, float]]]


def settings_of(*flags: str, llr: bool = True) -> tuple[Run, Settings]:
    """Learning rate and weight decay of Megatron's param groups, before every update."""
    used: Settings = []

    def read(run: Run, update: int, done: bool) -> None:
        if not done:
            groups = run.optimizer.param_groups
            used.append([(group["lr"], group["weight_decay"]) for group in groups])

    return train(*flags, llr=llr, on_update=read), used


@pytest.fixture
def saved(shared_dir: Path) -> str:
    train(f"--save {shared_dir} {SAVE}")
    return f"--load {shared_dir} --exit-interval 7"


@pytest.mark.parametrize("flags", ["--lr 1e-3", "--lr 1e-3 --override-opt-param-scheduler"])
def test_another_rate_on_resume_is_refused_by_megatron_itself(saved: str, flags: str) -> None:
    for llr in (False, True):
        with pytest.raises(ValueError, match="Could not find parameter group with key"):
            train(saved, flags, llr=llr)


def test_overridden_settings_take_effect_and_multipliers_continue(saved: str) -> None:
    flags = "--override-opt-param-scheduler --weight-decay 0.2 --lr-decay-style linear"
    unbroken = train("--exit-interval 7")
    run, used = settings_of(saved, flags)
    _, plain = settings_of(saved, flags, llr=False)
    assert used == plain
    assert [group[0][1] for group in used] == [0.2, 0.2]
    assert run.multipliers == unbroken.multipliers
    assert max(run.multipliers.values()) > 1


def test_the_checkpoints_weight_decay_holds_from_the_second_update(saved: str) -> None:
    """Megatron's loader steps the scheduler before it takes the checkpoint's weight decay."""
    flags = "--use-checkpoint-opt-param-scheduler --weight-decay 0.2"
    _, used = settings_of(saved, flags)
    _, plain = settings_of(saved, flags, llr=False)
    assert used == plain
    assert [group[0][1] for group in used] == [0.2, 0.1]


def test_a_checkpoint_of_plain_megatron_is_named(
    shared_dir: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    train(f"--save {shared_dir} {SAVE}", llr=False)
    capfd.readouterr()
    load = f"--load {shared_dir} --exit-interval 6 --llr-active-fraction 0.5"
    train(load)
    line = "[llr] multipliers start from 1 at update 6: "
    assert f"{line}the checkpoint has no state of the extension\n" in capfd.readouterr().out
    train(load, "--llr-reset-state")
    assert f"{line}--llr-reset-state ignores" in capfd.readouterr().out
    train("--exit-interval 1")
    assert "multipliers start from 1" not in capfd.readouterr().out


@pytest.mark.parametrize(("embedding", "factor"), [("max", 5.0), ("one", 1.0)])
def test_a_decoupled_rate_is_the_base_of_the_embeddings_multiplier(
    embedding: str, factor: float, capfd: pytest.CaptureFixture[str]
) -> None:
    decoupled = "--decoupled-lr 1e-4 --decoupled-min-lr 1e-5"
    run = train(decoupled, f"--llr-embedding {embedding} --exit-interval 3")
    printed = capfd.readouterr().out
    assert (
        "--decoupled-lr 0.0001 is the base learning rate of embedding and head, which "
        f"--llr-embedding {embedding} multiplies" in printed
    )
    for matrix in ("embedding", "head"):
        explained = run.controller.explanation(matrix)
        assert explained.base_rate == 1e-4
        assert explained.multiplier == factor
    assert run.controller.explanation("block.1.mlp.up").base_rate == 2e-3
