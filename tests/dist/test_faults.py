"""Bad input and bad weights: the same one-line error on every rank, or the rule for weights."""

import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from harness import Run, train

from megatron_llr import state
from megatron_llr.megatron import versions
from megatron_llr.ranks import gather_objects, require_equal, together

# Four ranks would need a layout of their own; what is said on two is said on all.
pytestmark = pytest.mark.world_size(1, 2)


def error_of(*flags: str) -> str:
    """The error that a job ends with, which must be the same on every rank."""
    with pytest.raises((ValueError, RuntimeError)) as caught:
        train(*flags)
    told = gather_objects((type(caught.value), str(caught.value)))
    assert all(other == told[0] for other in told)
    assert "\n" not in told[0][1]
    return str(told[0][1])


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        ("--llr-policy best", "--llr-policy best is not valid. It must be one of esd, "),
        (
            "--llr-interval 4 --llr-ramp-iters 4",
            "--llr-ramp-iters 4 is not valid. It must be from 0 to 3",
        ),
        ("--llr-active-fraction 0.01", "--llr-active-fraction 0.01 leaves no update"),
        ("--sft", "--sft is not supported yet"),
        ("--logits-load-dir x", "--logits-load-dir is not supported yet"),
        (
            "--hidden-size 32 --ffn-hidden-size 32 --num-attention-heads 4",
            "the model has no matrix to tune",
        ),
    ],
)
def test_bad_input_is_one_line_on_all_ranks(flags: str, text: str) -> None:
    assert text in error_of(flags)


def test_a_policy_of_ones_own_must_be_there_and_give_the_same_on_every_rank(
    shared_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (shared_dir / f"own_policy_{dist.get_world_size()}.py").write_text(
        "import os\n"
        "def by_rank(alphas, config):\n"
        "    return {m: 1.0 + int(os.environ['RANK']) for m in alphas}\n"
        "def mixed(alphas, config):\n    return {}\n"
        "mixed.acts_on = ('learning_rate', 'weight_decay')[int(os.environ['RANK'])]\n"
        "def halves(alphas, config):\n    return {m: 0.5 for m in alphas if 'up' in m}\n"
    )
    dist.barrier()
    monkeypatch.syspath_prepend(str(shared_dir))
    module = f"own_policy_{dist.get_world_size()}"
    run = train(f"--llr-policy {module}:halves")
    assert (run.multipliers["block.2.mlp.up"], run.multipliers["block.2.mlp.gate"]) == (0.5, 1.0)
    assert f"bad --llr-policy {module}:nothing" in error_of(f"--llr-policy {module}:nothing")
    if dist.get_world_size() == 2:
        text = error_of(f"--llr-policy {module}:by_rank")
        assert "target of embedding differs between ranks: 1.0 on rank 0, 2.0 on rank 1" in text
        text = error_of(f"--llr-policy {module}:mixed")
        assert (
            f"the quantity that --llr-policy {module}:mixed acts on differs between ranks" in text
        )


@pytest.mark.parametrize("found", ["0.16.1", "0.20.0"])
def test_another_megatron_core_is_refused(found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions.metadata, "version", lambda name: found)
    with pytest.raises(ValueError, match=rf"megatron-core \({found}\).* must be >=0.19,<0.20"):
        versions.check_version()


def spoil(run: Run, matrix: str, value: float) -> None:
    """Overwrite one matrix of the model on the ranks that hold it."""
    from megatron_llr.megatron.catalog import build_catalog

    for shard in build_catalog(run.model).shards:
        if shard.matrix == matrix:
            for span in shard.placement.spans:
                with torch.no_grad():
                    shard.parameter[span.local : span.local + span.count].fill_(value)


@pytest.mark.parametrize("value", [0.0, math.nan])
def test_a_spoilt_matrix_keeps_its_multiplier_and_is_named(
    value: float, capfd: pytest.CaptureFixture[str]
) -> None:
    """Zero and NaN weights never reach a learning rate (design section 3)."""
    seen: dict[str, float] = {}

    def before_measurement(run: Run, update: int, done: bool) -> None:
        # The measurement before update 4 follows update 3; its weights are spoilt during update 3.
        if update == 3 and not done:
            controller = run.controller
            seen.update(controller.multipliers)
            measure = controller._engine.measure

            def spoilt() -> object:
                spoil(run, "block.1.mlp.up", value)
                return measure()

            controller._engine.measure = spoilt

    run = train(
        "--exit-interval 3 --no-check-for-nan-in-loss-and-grad", on_update=before_measurement
    )
    multipliers = run.multipliers
    assert multipliers["block.1.mlp.up"] == seen["block.1.mlp.up"]
    assert all(math.isfinite(value) and value > 0 for value in multipliers.values())
    document = run.controller.state_dict()
    assert state.decode(state.encode(document)) == document
    assert document["alphas"]["block.1.mlp.up"] is None
    if dist.get_rank() == 0:
        assert "no usable exponent, multiplier kept: block.1.mlp.up" in capfd.readouterr().out


@pytest.mark.world_size(2, 4)
def test_an_error_on_one_rank_is_raised_on_all() -> None:
    def fails() -> int:
        if dist.get_rank() == 1:
            raise ValueError("no room")
        return 1

    with pytest.raises(ValueError, match=r"no room \(rank 1\)"):
        together(fails)


@pytest.mark.world_size(2, 4)
def test_settings_that_differ_between_ranks_are_found() -> None:
    with pytest.raises(RuntimeError, match=r"--llr-interval differs between ranks.*0 on rank 0"):
        require_equal({"--llr-interval": dist.get_rank()}, lambda setting: f"set {setting}")


def test_a_log_folder_that_cannot_be_written_is_an_error_at_start(shared_dir: Path) -> None:
    if dist.get_rank() == 0:
        (shared_dir / "file").write_text("")
    dist.barrier()
    with pytest.raises((ValueError, RuntimeError), match="file"):
        train(f"--llr-log-dir {shared_dir / 'file'}")


@pytest.mark.world_size(2)
def test_a_disk_that_fills_up_during_training_costs_the_log_alone(
    shared_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Files on /dev/full from the second update on: the losses are those of an undisturbed run."""
    names = ("measurements.csv", "learning_rates.csv", "spectra.part.npz")

    def fill_up(run: Run, update: int, done: bool) -> None:
        if update == 2 and not done and dist.get_rank() == 0:
            for name in names:
                (shared_dir / name).unlink(missing_ok=True)
                (shared_dir / name).symlink_to("/dev/full")

    run = train(f"--llr-log-dir {shared_dir}", on_update=fill_up)
    undisturbed = train()
    assert run.losses == undisturbed.losses
    assert run.multipliers == undisturbed.multipliers
    if dist.get_rank() == 0:
        # Updates 2 to 8 have rates each; the measurement before update 4 has rows and spectra.
        assert caplog.text.count(f"{shared_dir} not written: [Errno 28]") == 7 + 2
