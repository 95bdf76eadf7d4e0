"""The comparison tool without training: grids, counterparts, statistics, flags, the report."""

import csv
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch.utils.tensorboard import SummaryWriter

from megatron_llr.tools.compare.aggregate import summaries_of
from megatron_llr.tools.compare.checks import flagged
from megatron_llr.tools.compare.command_flags import beyond_policy, value_of
from megatron_llr.tools.compare.counterparts import effects
from megatron_llr.tools.compare.grid import Grid, Run
from megatron_llr.tools.compare.grid_file import read_grid
from megatron_llr.tools.compare.jobs import _prepare_folder, command, pending
from megatron_llr.tools.compare.report import write_report
from megatron_llr.tools.compare.results import has_diverged, read_result, write_done
from megatron_llr.tools.compare.statistics import (
    detectable,
    difference_of,
    mean_of,
    reaches,
    student_quantile,
)

MakeGrid = Callable[..., Grid]

FLAGS = "--seq-length 16 --global-batch-size 4 --train-iters 100 --eval-interval 50 --eval-iters 2"
WHOLE: dict[str, Any] = {
    "learning_rates": ["1e-3", 3e-3],
    "seeds": [1, 2, 3],
    "flags": FLAGS,
    "policies": {"uniform": "--llr-policy uniform", "esd": "--llr-policy esd"},
}


@pytest.fixture
def make_grid(tmp_path: Path) -> MakeGrid:
    def make(**more: Any) -> Grid:
        path = tmp_path / "grid.yaml"
        path.write_text(
            yaml.safe_dump({**WHOLE, "out": str(tmp_path / "out"), **more}, sort_keys=False)
        )
        return read_grid(path)

    return make


def finish(run: Run, losses: list[float], *, first: float = 5.0, **more: Any) -> None:
    """Leave what a finished run leaves; losses at iterations 50, 100, ..."""
    with SummaryWriter(run.folder / "tensorboard") as writer:
        writer.add_scalar("lm loss", first, 1)
        for index, loss in enumerate(losses, 1):
            writer.add_scalar("lm loss validation", loss, 50 * index)
    write_done(run, **{"died_of_nan": False, "seconds": 1.0, "environment": {}, **more})


def test_every_esd_policy_gets_its_controls(make_grid: MakeGrid) -> None:
    grid = make_grid()
    assert list(grid.policies) == [
        *("uniform", "esd", "esd-mean1", "esd-random", "esd-inverse", "esd-shape"),
        *("esd-role-mean", "esd-embedding-only"),
    ]
    kinds = {name: value_of(words, "--llr-policy") for name, words in grid.policies.items()}
    assert kinds["esd-random"] == "random"
    assert kinds["esd-inverse"] == "inverse"
    preserving = {n for n, words in grid.policies.items() if "--llr-mean-preserving" in words}
    assert kinds["esd-shape"] == "shape"
    assert kinds["esd-role-mean"] == "role-mean"
    assert preserving == set(grid.policies) - {"uniform", "esd", "esd-embedding-only"}
    named = {(e.policy, e.against) for e in effects(grid.policies, grid.flags, "uniform")}
    assert named == {
        ("esd", "uniform"),
        ("esd-embedding-only", "uniform"),
        ("esd", "esd-embedding-only"),
        ("esd", "esd-mean1"),
        ("esd-mean1", "esd-random"),
        ("esd-mean1", "esd-inverse"),
        ("esd-mean1", "esd-shape"),
        ("esd-mean1", "esd-role-mean"),
    }
    assert list(make_grid(counterparts=False).policies) == ["uniform", "esd"]


def test_farms_is_compared_with_the_same_policy_and_has_no_shape_control(
    make_grid: MakeGrid,
) -> None:
    policies = {
        **WHOLE["policies"],
        "farms": "--llr-policy esd --llr-mean-preserving --llr-spectrum farms --llr-farms-rows 60",
        "ks": "--llr-policy esd --llr-estimator ks",
    }
    grid = make_grid(policies=policies)
    assert {"farms-random", "farms-role-mean", "ks-mean1", "ks-random"} <= set(grid.policies)
    assert not {"farms-shape", "ks-shape"} & set(grid.policies)
    named = {
        (e.policy, e.against)
        for e in effects(grid.policies, grid.flags, "uniform")
        if "FARMS" in e.meaning
    }
    assert named == {("farms", "esd-mean1")}


def test_existing_and_pointless_controls_are_not_added(make_grid: MakeGrid) -> None:
    policies = {
        "uniform": "--llr-policy uniform",
        "head-start": "--llr-policy embedding-only",
        "llr": "--llr-policy esd --llr-mean-preserving",
        "plain": "--llr-policy esd --llr-embedding one",
    }
    added = set(make_grid(policies=policies).policies) - set(policies)
    assert added == {
        *("llr-random", "llr-inverse", "llr-shape", "llr-role-mean"),
        *("plain-mean1", "plain-random", "plain-inverse", "plain-shape", "plain-role-mean"),
    }


def test_controls_do_not_replace_the_users_policies(make_grid: MakeGrid) -> None:
    policies = {**WHOLE["policies"], "esd-random": "--llr-policy random"}
    with pytest.raises(
        ValueError, match=r"The grid .*grid\.yaml has policy esd-random with .* esd's counterpart"
    ):
        make_grid(policies=policies)
    assert list(make_grid(policies=policies, counterparts=False).policies) == list(policies)
    # The counterpart's own flags, in another order and with one that all runs have.
    same = "--llr-mean-preserving --llr-policy=random --seq-length 16"
    grid = make_grid(policies={**policies, "esd-random": same})
    assert grid.policies["esd-random"] == tuple(same.split())
    assert len(grid.policies) == 8


def test_runs_differ_only_in_policy_rate_and_seed(make_grid: MakeGrid) -> None:
    grid = make_grid()
    runs = grid.base_runs()
    assert len(runs) == 8 * 2 * 3 == len({run.folder for run in runs})
    assert [run.seed for run in runs] == [1] * 16 + [2] * 16 + [3] * 16
    for run in runs:
        assert value_of(run.settings, "--lr") == f"{run.learning_rate:g}"
        assert value_of(run.settings, "--min-lr") == f"{run.learning_rate * 0.1:g}"
        assert {"--llr-same-start", "--llr-fixed-validation"} <= set(run.settings)
        permutation = value_of(run.settings, "--llr-random-seed")
        assert permutation == (str(run.seed) if run.policy == "esd-random" else None)
        assert beyond_policy(run.settings, grid.base_runs()[0].settings) in (
            [],
            *(["--seed"], ["--lr", "--min-lr"], ["--lr", "--min-lr", "--seed"]),
        )
    line = command(make_grid(launch="torchrun --nproc-per-node 8"), runs[0])
    assert line[:4] == ["torchrun", "--nproc-per-node", "8", "pretrain_gpt_llr.py"]
    assert "--save" not in line
    saving = make_grid(flags=FLAGS + " --save-interval 10")
    assert str(runs[0].folder / "checkpoint") in command(saving, saving.base_runs()[0])


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"polices": {}}, "polices"),
        ({"flags": "--seq-length 16"}, "flags without --global-batch-size"),
        ({"flags": FLAGS + " --lr 1"}, "flags: --lr"),
        ({"policies": {"a/b": "", "uniform": ""}}, "a/b"),
        ({"policies": {"esd": ""}}, "the control 'uniform'"),
        ({"policies": ["esd"]}, "policies: "),
        ({"seeds": [1, 1]}, "seeds: "),
        ({"seeds": 3}, "seeds: "),
        ({"learning_rates": [0.0]}, "learning_rates: "),
        ({"learning_rates": ["fast"]}, "learning_rates: "),
        ({"learning_rates": [1.0000001e-3, 1.0000002e-3]}, "values that differ in their first six"),
        ({"min_lr_ratio": "low"}, "min_lr_ratio: "),
        ({"min_lr_ratio": -0.1}, "min_lr_ratio: -0.1. It must have a number there, 0 or more"),
        ({"gpus_per_run": None}, "gpus_per_run: "),
    ],
)
def test_a_bad_grid_is_refused(make_grid: MakeGrid, more: dict[str, Any], named: str) -> None:
    with pytest.raises(
        ValueError,
        match=r"^megatron_llr: The grid .*grid\.yaml has .* It must have .* Correct the file\.$",
    ) as caught:
        make_grid(**more)
    assert named in str(caught.value)


def test_a_rate_may_decay_to_zero_and_out_may_be_in_the_home_folder(
    make_grid: MakeGrid, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    grid = make_grid(min_lr_ratio=0, out="~/runs")
    assert grid.out == tmp_path / "runs"
    assert {value_of(run.settings, "--min-lr") for run in grid.base_runs()} == {"0"}


@pytest.mark.parametrize(
    ("freedom", "quantile"),
    # Two-sided 95 %: the printed tables of Student's t.
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (9, 2.262), (30, 2.042), (120, 1.980)],
)
def test_students_t(freedom: int, quantile: float) -> None:
    assert student_quantile(0.975, freedom) == pytest.approx(quantile, abs=6e-4)
    assert student_quantile(0.025, freedom) == pytest.approx(-quantile, abs=6e-4)


@pytest.mark.parametrize(
    ("freedom", "quantile"),
    [
        # Closed forms for 1 and 2 degrees of freedom.
        (1, math.tan(0.475 * math.pi)),
        (2, 0.95 / math.sqrt(2 * 0.975 * 0.025)),
        # Numerical integration and bisection, to 1e-10.
        (3.7, 2.867520707191),
        (9, 2.262157162798),
        (120, 1.979930405082),
    ],
)
def test_students_t_to_nine_digits(freedom: float, quantile: float) -> None:
    assert student_quantile(0.975, freedom) == pytest.approx(quantile, abs=1e-9)


def test_means_and_paired_differences() -> None:
    assert mean_of([1.0, 2.0, 3.0]).error == pytest.approx(1 / math.sqrt(3))
    assert math.isnan(mean_of([2.0]).error)
    paired = difference_of({1: 1.0, 2: 2.0, 3: 3.0}, {1: 1.5, 2: 2.3, 3: 3.4})
    assert paired.paired
    assert paired.value == pytest.approx(-0.4)
    half = 4.303 * 0.1 / math.sqrt(3)
    assert (paired.low, paired.high) == (
        pytest.approx(-0.4 - half, abs=1e-4),
        pytest.approx(-0.4 + half, abs=1e-4),
    )
    # Welch (1947): equal sizes and variances have 2 (n - 1) degrees of freedom.
    welch = difference_of({1: 1.0, 2: 2.0, 3: 3.0}, {4: 1.0, 5: 2.0, 6: 3.0})
    assert not welch.paired
    assert welch.high == pytest.approx(2.776 * math.sqrt(2 / 3), abs=1e-3)
    assert math.isnan(difference_of({1: 1.0}, {1: 2.0}).low)


@pytest.mark.parametrize(
    ("seeds", "shift"),
    # Paired t test, 5 % two-sided, power 80 %: Cohen's d from printed tables of power.
    [(10, 0.996), (20, 0.660), (30, 0.529)],
)
def test_the_smallest_detectable_difference(seeds: int, shift: float) -> None:
    assert detectable(0.02, seeds) == pytest.approx(0.02 * shift, abs=1e-5)
    assert math.isnan(detectable(0.02, 1))


def test_when_a_curve_reaches_a_loss() -> None:
    curve = [(50, 3.0), (100, 2.0), (150, 2.5)]
    assert reaches(curve, 2.25) == 87.5
    assert reaches(curve, 3.5) == 50
    assert reaches(curve, 1.9) is None
    assert reaches([], 1.0) is None


def test_what_counts_as_diverged() -> None:
    assert has_diverged(5.0, ((50, math.nan),), died_of_nan=False)
    assert has_diverged(5.0, ((50, 4.0), (100, 5.1)), died_of_nan=False)
    assert has_diverged(5.0, (), died_of_nan=True)
    assert not has_diverged(5.0, ((50, 5.5), (100, 4.9)), died_of_nan=False)


def test_a_finished_run_is_neither_repeated_nor_deleted(make_grid: MakeGrid) -> None:
    grid = make_grid()
    first = grid.base_runs()[0]
    finish(first, [3.0, 2.0])
    assert first not in pending(grid)
    assert len(pending(grid)) == 47
    (grid.base_runs()[1].folder).mkdir(parents=True)
    (grid.base_runs()[1].folder / "done.json").write_text('{"version": 1, "dig')
    assert grid.base_runs()[1] in pending(grid)
    changed = make_grid(flags=FLAGS + " --weight-decay 0.2")
    with pytest.raises(ValueError, match=r"--weight-decay None, now 0\.2.*--rerun-changed"):
        pending(changed)
    assert len(pending(changed, rerun_changed=True)) == 48
    assert read_result(changed.base_runs()[0]) is None
    more = make_grid(learning_rates=[1e-3, 3e-3, 1e-2])
    assert len(pending(more)) == 71


def test_only_a_checkpoint_with_the_same_settings_is_resumed(make_grid: MakeGrid) -> None:
    run, other = make_grid().base_runs()[:2]
    for expected in (False, True):
        _prepare_folder(run)
        assert (run.folder / "checkpoint").exists() is expected
        (run.folder / "checkpoint").mkdir(exist_ok=True)
    (run.folder / "begun.txt").write_text(other.digest)
    _prepare_folder(run)
    assert not (run.folder / "checkpoint").exists()
    (run.folder / "checkpoint").mkdir()
    finish(run, [1.0])
    _prepare_folder(run)
    assert not (run.folder / "done.json").exists()
    assert not (run.folder / "checkpoint").exists()


def filled(grid: Grid) -> None:
    """At 1e-3 uniform is best, esd at 3e-3 and 0.1 better; random diverges at 3e-3."""
    for run in grid.base_runs():
        offset = {"uniform": 0.0, "esd": -0.2}.get(run.policy, 0.05)
        steep = run.learning_rate > 2e-3
        losses = [3.0 + offset, 2.0 + offset + 0.01 * run.seed + (0.1 if steep else 0.0)]
        if run.policy == "esd" and steep:
            losses[1] -= 0.1 + 0.001 * run.seed**2
        finish(run, [*losses, math.nan] if run.policy == "esd-random" and steep else losses)


def test_the_report_compares_each_at_its_best_rate(make_grid: MakeGrid) -> None:
    grid = make_grid()
    filled(grid)
    results = [read_result(run) for run in grid.base_runs()]
    rows = {row.cell.policy: row for row in summaries_of(grid, [r for r in results if r])}
    assert next(iter(rows)) == "uniform"
    assert rows["uniform"].cell.learning_rate == 1e-3
    assert rows["uniform"].speedup == 1.0
    esd = rows["esd"]
    assert esd.cell.learning_rate == 3e-3
    assert esd.difference is not None
    assert esd.difference.value == pytest.approx(-0.2 - 0.014 / 3)
    assert esd.difference.high < -0.19
    # 2.8 to 1.8153 on a line, down to 2.02, in iterations 50 to 100 of 64 tokens.
    assert esd.tokens == pytest.approx(64 * (50 + 50 * (2.8 - 2.02) / (2.8 - 1.8153333)))
    assert esd.speedup == pytest.approx(64 * 100 / esd.tokens)
    assert rows["esd-mean1"].tokens is None
    assert "diverged at 0.003: 3 of 3" in rows["esd-random"].notes
    text = write_report(grid)
    assert "FLAGGED" not in text
    assert "their order, against random" in text
    assert "beyond role (order of blocks)" in text
    assert "smallest difference to the control that could have been detected" in text
    assert text == (grid.out / "table.txt").read_text().rstrip("\n")
    for name, lines in (("runs", 48), ("table", 8), ("curves", 45 * 2 + 3 * 3)):
        with (grid.out / f"{name}.csv").open() as file:
            assert len(list(csv.DictReader(file))) == lines, name
    for name in ("curves.png", "learning_rates.png"):
        assert (grid.out / name).stat().st_size > 10_000


def test_an_unfinished_grid_is_reported(make_grid: MakeGrid) -> None:
    grid = make_grid()
    assert write_report(grid).startswith("0 of 48 runs done")
    for run in grid.base_runs()[:3]:
        finish(run, [3.0, 2.0])
    assert "1 of 3 seeds" in write_report(grid)


def test_an_unfair_comparison_is_flagged(make_grid: MakeGrid) -> None:
    policies = {
        "uniform": "--llr-policy uniform",
        "heavier": "--llr-policy depth-linear --weight-decay 0.3",
    }
    grid = make_grid(policies=policies, learning_rates=[1e-3], seeds=[1])
    control, other = grid.base_runs()
    finish(control, [3.0, 2.0], first=5.0, environment={"torch": "2.13"})
    finish(other, [3.0], first=5.01, environment={"torch": "2.12"})
    lines = flagged(grid, [r for r in map(read_result, grid.base_runs()) if r])
    for part in (
        "heavier differs from uniform in --weight-decay",
        "heavier, lr 0.001, seed 1: loss 5.01 at update 1, but the control has 5",
        "evaluated at different updates",
        "different torch: 2.12, 2.13",
    ):
        assert any(part in line for line in lines), part
    assert "FLAGGED:" in write_report(grid)


def test_a_first_loss_that_was_not_logged_is_no_difference(make_grid: MakeGrid) -> None:
    flags = FLAGS + " --tensorboard-log-interval 10"
    grid = make_grid(flags=flags, learning_rates=[1e-3], seeds=[1], counterparts=False)
    for run in grid.base_runs():
        finish(run, [3.0, 2.0], first=math.nan)
        assert value_of(command(grid, run), "--tensorboard-log-interval") == "1"
    assert flagged(grid, [r for r in map(read_result, grid.base_runs()) if r]) == []


def test_the_record_of_a_run_names_its_settings(make_grid: MakeGrid) -> None:
    run = make_grid().base_runs()[0]
    finish(run, [1.0])
    record = json.loads((run.folder / "done.json").read_text())
    assert record["settings"] == list(run.settings)
    assert {path.name for path in run.folder.iterdir()} == {"done.json", "tensorboard"}
