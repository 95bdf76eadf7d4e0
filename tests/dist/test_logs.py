"""CSV files and scalars of a real run."""

import csv
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist
from harness import Run, train
from layouts import HERE

from megatron_llr import controller
from megatron_llr.measurement import measure
from megatron_llr.megatron import seams
from megatron_llr.param_groups.step_recorder import StepRecorder
from megatron_llr.ranks import together
from megatron_llr.telemetry.log_rows import MEASUREMENT_FIELDS, RATE_FIELDS
from tests.reference import llr as reference

FLAGS = next(iter(HERE)).flags


def rows(path: Path) -> list[dict[str, Any]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def on_all_ranks(check: Any) -> None:
    """Rank 0 looks at the files; what it finds wrong fails the test on every rank."""
    dist.barrier()
    together(lambda: check() if dist.get_rank() == 0 else None)


def test_the_files_say_what_happened(shared_dir: Path) -> None:
    """Rates are those that the updates used, norms those of the weights after them."""
    norms: dict[str, float] = {}

    def keep_norms(run: Run, update: int, done: bool) -> None:
        if done and update == 8:
            whole = run.whole_weights(252)
            norms.update((matrix, float(weight.norm())) for matrix, weight in whole.items())

    # 252 rows are a multiple of 4, so that the vocabulary has no padding rows.
    flags = f"--llr-log-dir {shared_dir} --tensorboard-dir {shared_dir / 'tb'} --log-interval 2"
    run = train(FLAGS, flags, "--vocab-size 252", on_update=keep_norms)

    def check() -> None:
        measured = rows(shared_dir / "measurements.csv")
        assert tuple(measured[0]) == MEASUREMENT_FIELDS
        assert [r["iteration"] for r in measured if r["matrix"] == "head"] == ["1", "4"]
        by_matrix = {r["matrix"]: r for r in measured if r["iteration"] == "4"}
        assert len(by_matrix) == 4 * 7 + 2
        assert by_matrix["head"]["alpha_hill_median"] == ""
        up = by_matrix["block.2.mlp.up"]
        assert (up["block"], up["role"], up["expert"]) == ("2", "up", "")
        assert (up["rows"], up["cols"], up["num_eigenvalues"]) == ("192", "128", "128")
        assert float(up["alpha_hill_median"]) > 1
        for matrix, row in by_matrix.items():
            assert float(row["target_multiplier"]) == run.multipliers[matrix]
        rates = rows(shared_dir / "learning_rates.csv")
        assert tuple(rates[0]) == RATE_FIELDS
        assert sorted({int(r["iteration"]) for r in rates}) == [2, 4, 6, 8]
        for row in rates:
            update = int(row["iteration"])
            base = reference.cosine(update, warmup=2, total=8, peak=2e-3, low=2e-4)
            rate = float(row["learning_rate"])
            assert rate == pytest.approx(base * float(row["multiplier"]), rel=1e-9)
            if update == 8:
                expected = rate / norms[row["matrix"]]
                assert float(row["effective_learning_rate"]) == pytest.approx(expected, rel=1e-4)
        spectra = np.load(shared_dir / "spectra.npz")
        assert len(spectra["block.2.mlp.up"]) == 128
        assert spectra["block.2.mlp.up"][-1] == pytest.approx(float(up["spectral_norm"]))
        assert list((shared_dir / "tb").glob("events*"))

    on_all_ranks(check)


class Rows:
    """Stands for W&B: what it was given, and at which of its steps."""

    def __init__(self) -> None:
        self.logged: list[tuple[int, int]] = []

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        assert name.startswith("llr/")

    def log(self, values: dict[str, float], step: int, commit: bool) -> None:
        assert not commit
        axes = {"llr/update", "llr/measured_before_update"} & set(values)
        self.logged.append((step, int(values[axes.pop()])))


def test_scalars_reach_tensorboard_and_wandb(
    shared_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """W&B's at the iteration that Megatron logs next: at a later one it would drop Megatron's."""
    wandb = Rows()
    monkeypatch.setattr(seams, "get_wandb_writer", lambda: wandb)
    flags = f"--tensorboard-dir {shared_dir / 'tb'} --log-interval 4 --llr-log-relative-update"
    train(FLAGS, flags, "--log-memory-to-tensorboard")
    assert list(dict.fromkeys(wandb.logged)) == [(0, 1), (3, 4), (4, 4), (8, 8)]

    def check() -> None:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(shared_dir / "tb"))
        events.Reload()
        tags = set(events.Tags()["scalars"])
        assert {
            "llr/multiplier/q/block_000",
            "llr/learning_rate-by-role/up/mean",
            "llr/relative_update-by-role/up/mean",
            "llr/relative_update/v/block_001",
            "llr/alpha_hill_median/down/block_003",
            "llr/target_multiplier/head",
        } <= tags
        points = events.Scalars("llr/multiplier/head")
        assert [(point.step, point.value) for point in points] == [(4, 5.0), (8, 5.0)]

    on_all_ranks(check)


@pytest.mark.world_size(1, 2)
def test_a_resumed_run_cuts_the_rows_that_it_writes_again(shared_dir: Path) -> None:
    log = f"--llr-log-dir {shared_dir / 'log'} --llr-log-relative-update"
    train(FLAGS, log, f"--save {shared_dir / 'ckpt'} --save-interval 3")
    before: dict[str, list[dict[str, Any]]] = {}

    def keep() -> None:
        for name in ("measurements.csv", "learning_rates.csv"):
            before[name] = rows(shared_dir / "log" / name)
        # A row that a kill tore in half.
        with (shared_dir / "log" / "learning_rates.csv").open("a") as file:
            file.write("9,head,1.0")

    on_all_ranks(keep)
    load = f"--load {shared_dir / 'ckpt'} --ckpt-step 3"
    stood = {path: path.read_bytes() for path in (shared_dir / "log").iterdir()}
    with pytest.raises(SystemExit):
        train(FLAGS, log, load, f"--llr-dry-run --tensorboard-dir {shared_dir / 'tb'}")
    with pytest.raises(ValueError, match="leaves no update to measure before"):
        train(FLAGS, log, load, "--llr-reset-state --llr-active-iters 3")
    assert {path: path.read_bytes() for path in (shared_dir / "log").iterdir()} == stood
    dist.barrier()
    train(FLAGS, log, load)

    def check() -> None:
        for name, kept in before.items():
            assert rows(shared_dir / "log" / name) == kept, name

    on_all_ranks(check)


EXPERTS = "--num-experts 4 --moe-ffn-hidden-size 128 --moe-token-dispatcher-type allgather"


@pytest.mark.world_size(1, 2)
def test_blocks_and_roles_are_logged_instead_of_matrices(
    shared_dir: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Experts of a block share rows; no spectrum travels; a resumed run may change the choice."""
    monkeypatch.setattr(controller, "_MANY", 20)
    gather = measure.all_gather_in_batches
    monkeypatch.setattr(measure, "all_gather_in_batches", None)
    log = f"--llr-log-dir {shared_dir / 'log'} --num-layers 2"
    flags = f"{EXPERTS} --expert-model-parallel-size {dist.get_world_size()} {log}"
    roles = train(flags, f"--llr-log-matrices roles --save {shared_dir / 'ckpt'} --save-interval 2")
    assert "logs blocks and roles" not in capfd.readouterr().out

    def check() -> None:
        log = shared_dir / "log"
        assert sorted(path.name for path in log.iterdir()) == [
            "learning_rates_by_role.csv",
            "measurements_by_role.csv",
        ]
        measured = rows(log / "measurements_by_role.csv")
        last = {(r["block"], r["role"]): r for r in measured if r["iteration"] == "4"}
        assert len(last) == 2 + 2 * (4 + 1 + 3)
        alphas = [roles.alphas[f"block.1.mlp.expert.{number}.up"] for number in range(4)]
        row = last["1", "expert.up"]
        assert (row["matrices"], last["", "head"]["matrices"]) == ("4", "1")
        assert float(row["alpha_hill_median_mean"]) == pytest.approx(sum(alphas) / 4)
        assert float(row["alpha_hill_median_min"]) == min(alphas)
        assert {r["iteration"] for r in rows(log / "learning_rates_by_role.csv")} == set("12345678")

    on_all_ranks(check)
    monkeypatch.setattr(measure, "all_gather_in_batches", gather)
    train(flags, f"--load {shared_dir / 'ckpt'} --ckpt-step 2")

    def check_both() -> None:
        log = shared_dir / "log"
        assert {r["iteration"] for r in rows(log / "learning_rates_by_role.csv")} == set("12")
        assert {r["iteration"] for r in rows(log / "learning_rates.csv")} == set("345678")
        assert len(np.load(log / "spectra.npz").files) == 2 * (4 + 4 * 3)
        said = [line for line in capfd.readouterr().out.splitlines() if "blocks and roles" in line]
        assert said == [
            "[llr] 36 matrices, each with rows and curves of its own; "
            "--llr-log-matrices roles logs blocks and roles instead"
        ]

    on_all_ranks(check_both)


@pytest.mark.world_size(1, 2)
def test_without_a_log_nothing_is_gathered_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "all_gather_in_batches", None)
    monkeypatch.setattr(StepRecorder, "__init__", None)
    run = train(FLAGS, "--exit-interval 2")
    assert run.controller._engine.measure().spectra == {}


def test_uniform_measures_like_the_others(shared_dir: Path) -> None:
    run = train(FLAGS, f"--llr-policy uniform --llr-estimator ks --llr-log-dir {shared_dir}")
    assert len(run.alphas) == 28
    assert "mean alpha_ks" in run.controller.role_summary()

    def check() -> None:
        measured = rows(shared_dir / "measurements.csv")
        assert {row["target_multiplier"] for row in measured} == {"1.0"}
        assert all(math.isfinite(float(r["alpha_hat"])) for r in measured if r["block"])
        last = {row["matrix"]: row for row in measured}
        assert float(last["block.2.mlp.up"]["alpha_ks"]) == run.alphas["block.2.mlp.up"]

    on_all_ranks(check)
