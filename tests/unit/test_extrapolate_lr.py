"""Extrapolation of the rate: known surfaces and published formulas are recovered."""

import csv
import math
import random
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from megatron_llr.tools.extrapolate_lr.cli import main
from megatron_llr.tools.extrapolate_lr.observations import Observation
from megatron_llr.tools.extrapolate_lr.optima import fit_parabola, optimum_at

ROOT = Path(__file__).resolve().parents[2]
HEADER = "lr,tokens,loss,params,batch,effective_lr,seed,policy"
FACTORS = [2.0**power for power in (-2, -1, 0, 1, 2)]
DEPTH = 0.05


def surface(
    best: Callable[[float], float],
    tokens: Iterable[float],
    *,
    params: float | str = "",
    batch: float | str = "",
    noise: float = 0.0,
    seeds: int = 1,
    effective: Callable[[float, float], float] | None = None,
    policy: str = "",
) -> list[str]:
    """Rows of runs around the optimum best(D); loss = 2 + 0.05 ln(lr / best)^2 + noise."""
    draws, rows = random.Random(7), []
    for count in tokens:
        # Off the optimum by up to half a step, so that it is never one of the rates.
        center = best(count) * 2.0 ** draws.uniform(-0.5, 0.5)
        for seed in range(seeds):
            offset = draws.gauss(0, 0.1)
            for factor in FACTORS:
                rate = center * factor
                loss = 2 + offset + DEPTH * math.log(rate / best(count)) ** 2
                loss += draws.gauss(0, noise) if noise else 0.0
                elr = effective(rate, count) if effective else ""
                rows.append(f"{rate},{count},{loss},{params},{batch},{elr},{seed},{policy}")
    return rows


def extrapolate(folder: Path, rows: list[str], *more: str) -> list[dict[str, str]]:
    """The rows of fits.csv."""
    (folder / "runs.csv").write_text("\n".join([HEADER, *rows]) + "\n")
    assert main([str(folder / "runs.csv"), "--out", str(folder / "out"), *more]) == 0
    with (folder / "out" / "fits.csv").open() as file:
        return list(csv.DictReader(file))


def number(row: dict[str, str], column: str) -> float:
    return float(row[column])


def test_a_known_curvature_is_recovered(tmp_path: Path) -> None:
    """Quadratic in ln D in the rate; a power law in the effective rate, through growing norms."""

    def best(tokens: float) -> float:
        t = math.log(tokens / 1e9)
        return 2e-3 * math.exp(-0.2 * t - 0.03 * t * t)

    def effective(rate: float, tokens: float) -> float:
        t = math.log(tokens / 1e9)
        return rate / (20 * math.exp(-0.03 * t * t) * (rate / best(tokens)) ** 0.2)

    tokens = [1e9 * 2**power for power in range(-2, 4)]
    rows = surface(best, tokens, effective=effective)
    fits = extrapolate(tmp_path, rows, "--tokens", "64e9")
    law, quadratic, effective_law, effective_quadratic = fits
    assert [(f["variable"], f["model"]) for f in fits] == [
        ("rate", "power law"),
        ("rate", "quadratic"),
        ("effective rate", "power law"),
        ("effective rate", "quadratic"),
    ]
    assert number(quadratic, "curvature") == pytest.approx(-0.03, abs=1e-6)
    assert number(effective_quadratic, "curvature") == pytest.approx(0, abs=1e-6)
    assert number(effective_law, "exponent") == pytest.approx(-0.2, abs=1e-6)
    assert number(effective_law, "held_out_ratio") == pytest.approx(1, abs=1e-6)
    assert number(quadratic, "held_out_ratio") == pytest.approx(1, abs=1e-6)
    assert number(law, "held_out_ratio") > 1.1
    excess = DEPTH * math.log(number(law, "held_out_ratio")) ** 2
    assert number(law, "held_out_excess_loss") == pytest.approx(excess, rel=1e-4)
    assert number(quadratic, "prediction") == pytest.approx(best(64e9), rel=1e-5)
    # The power law misses the curvature, beyond the largest D by more.
    assert number(law, "prediction") > 1.4 * best(64e9)
    for name in ("extrapolation.txt", "optima.csv", "extrapolation.png"):
        assert (tmp_path / "out" / name).stat().st_size > 200


@pytest.mark.parametrize(
    ("formula", "exponents"),
    [
        # Marin, AdamH v16 (marin@0084342): T tokens, d width, B batch.
        (
            lambda t, d, b: 1.63 * t**-0.2813 * d**-0.3678 * math.sqrt(b),
            {"tokens": -0.2813, "params": -0.3678, "batch": 0.5},
        ),
        # Marin, MuonH, 17 cells.
        (
            lambda t, d, b: 18.31 * t**-0.395 * d**-0.150 * math.sqrt(b),
            {"tokens": -0.395, "params": -0.150, "batch": 0.5},
        ),
        # Step Law, arXiv 2503.04715: AdamW, N parameters, D tokens.
        (lambda t, n, _: 1.79 * n**-0.713 * t**0.307, {"tokens": 0.307, "params": -0.713}),
    ],
)
def test_published_formulas_give_back_their_exponents(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    formula: Callable[[float, float, float], float],
    exponents: dict[str, float],
) -> None:
    rows = []
    for params in (512.0, 1024.0, 2048.0):
        for batch in (32.0, 128.0) if "batch" in exponents else ("",):

            def best(tokens: float, params: float = params, batch: float | str = batch) -> float:
                return formula(tokens, params, float(batch or 1))

            rows += surface(best, [1e9, 4e9, 16e9, 64e9], params=params, batch=batch)
    fits = extrapolate(tmp_path, rows)
    for fit in fits:
        if fit["model"] == "power law":
            assert number(fit, "exponent") == pytest.approx(exponents["tokens"], abs=1e-6)
            assert number(fit, "held_out_ratio") == pytest.approx(1, abs=1e-6)
        else:
            assert number(fit, "curvature") == pytest.approx(0, abs=1e-6)
    joint = capsys.readouterr().out.split("joint power law of the rate: ")[1].splitlines()[0]
    for name, value in exponents.items():
        assert f"{name} {value:+.3f}" in joint


def test_intervals_cover_the_truth(tmp_path: Path) -> None:
    """Of 95 % intervals of the optimum and of the exponent from noisy surfaces."""
    inside = {"optimum": 0, "exponent": 0}
    draws, repeats = random.Random(1), 200
    for _ in range(repeats):
        logs = [math.log(factor) + 0.3 for factor in FACTORS] * 2
        losses = [2 + DEPTH * x * x + draws.gauss(0, 0.005) for x in logs]
        parabola = fit_parabola(logs, losses, [""] * len(logs))
        assert parabola is not None
        variance = parabola.squares / parabola.freedom
        low, high = parabola.interval(variance, 2.3646)
        inside["optimum"] += low <= 0 <= high
    rows = surface(lambda d: 1e-3 * (d / 1e9) ** -0.3, [1e9, 4e9, 16e9, 64e9], noise=2e-3, seeds=3)
    (law, _) = extrapolate(tmp_path, rows, "--tokens", "256e9")
    assert number(law, "exponent_low") < -0.3 < number(law, "exponent_high")
    assert number(law, "exponent_high") - number(law, "exponent_low") < 0.2
    truth = 1e-3 * 256**-0.3
    assert number(law, "prediction_low") < truth < number(law, "prediction_high")
    assert 0.90 * repeats <= inside["optimum"] <= 0.99 * repeats


def test_without_spare_points_there_is_no_interval(tmp_path: Path) -> None:
    """Three rates and one seed determine the parabola; two optima the power law."""
    fits = extrapolate(
        tmp_path, surface(lambda d: 1e-3, [1e9, 4e9]), "--window", "1.1", "--tokens", "1e10"
    )
    assert [fit["model"] for fit in fits] == ["power law"]
    assert math.isnan(number(fits[0], "exponent_low"))
    assert number(fits[0], "prediction") == pytest.approx(1e-3)
    assert fits[0]["held_out_ratio"] == ""


def runs(losses: dict[float, float]) -> list[Observation]:
    return [Observation(rate, 1e9, loss, None, "") for rate, loss in losses.items()]


@pytest.mark.parametrize(
    ("losses", "flag"),
    [
        ({1.0: 3.0, 2.0: 2.0}, "2 rates with a finite loss, needs 3"),
        ({1.0: 1.0, 2.0: 2.0, 4.0: 3.0}, "not bracketed: best at the smallest rate"),
        ({1.0: 3.0, 2.0: 2.0, 4.0: 1.0}, "not bracketed: best at the largest rate"),
        (
            {1.0: 3.0, 2.0: 2.0, 4.0: 1.0, 8.0: math.inf},
            "not bracketed: best at the largest rate that did not diverge",
        ),
        ({1.0: math.nan, 2.0: math.inf, 4.0: math.nan}, "every rate diverged"),
    ],
)
def test_an_optimum_that_is_not_there_is_flagged(losses: dict[float, float], flag: str) -> None:
    optimum = optimum_at(1e9, runs(losses), 4.0)
    assert optimum.flag == flag
    assert optimum.rate is None


def test_the_best_batch_is_the_lower_envelope(tmp_path: Path) -> None:
    """Batch 2 is better everywhere but has its optimum elsewhere."""
    rows = surface(lambda d: 1e-3, [1e9, 4e9], batch=1)
    better = surface(lambda d: 2e-3, [1e9, 4e9], batch=2)
    rows += [row.replace(",2.", ",1.", 1) for row in better]
    fits = extrapolate(tmp_path, rows, "--best-batch", "--tokens", "8e9")
    assert [fit["batch"] for fit in fits] == [""]
    assert number(fits[0], "prediction") == pytest.approx(2e-3, rel=1e-4)


ROW = "1e-3,1e9,2.5,,,,,"


@pytest.mark.parametrize(
    ("rows", "more", "text"),
    [
        (surface(lambda d: 1e-3, [1e9]), [], "has 1 numbers of tokens, 1 with an optimum"),
        (["1e-3,1e9,2.5,,,,,", "1e-3,2e9,2.4,,,,,"], [], "1 rate with a finite loss, needs 3"),
        ([], [], "has no run"),
        (["fast,1e9,2.5,,,,,"], [], "line 2, has lr: 'fast'. It must be a number from 1e-30 to"),
        (["1e-3,nan,2.5,,,,,"], [], "line 2, has tokens: 'nan'"),
        (["1e-3,1e9,,,,,,"], [], "line 2, has loss: ''. It must be a number up to 1e+30, or nan"),
        (["1e-3,1e9,2.5,,,-1,,"], [], "line 2, has effective_lr: '-1'"),
        (["1e-3,1e9,2.5,,,,3,", "1e-3,1e9,2.6,,,,3,"], [], "two runs with lr 0.001, 1e+09 tokens"),
        ([ROW], ["--columns", "D=tokens"], "must be pairs such as tokens=D"),
        ([ROW], ["--columns", "tokens=D"], "has no column D; its columns are 'lr', 'tokens'"),
        ([ROW], ["--tokens", "0"], "--tokens is 0. It must be a finite number above 0"),
        ([ROW], ["--window", "1"], "--window is 1. It must be a finite number above 1"),
        ([ROW], ["--policy", "esd"], "--policy esd is not in the input"),
    ],
)
def test_bad_input_is_one_line(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    rows: list[str],
    more: list[str],
    text: str,
) -> None:
    (tmp_path / "runs.csv").write_text("\n".join([HEADER, *rows]) + "\n")
    assert main([str(tmp_path / "runs.csv"), "--out", str(tmp_path / "out"), *more]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("megatron_llr: ")
    assert text in captured.err
    assert not (tmp_path / "out").exists()


def test_the_script_reads_the_folder_of_a_grid(tmp_path: Path) -> None:
    header = (
        "policy,learning_rate,seed,iterations,tokens,final_loss,best_loss,diverged,first_loss,"
        "seconds,effective_learning_rate"
    )
    rows = []
    for line in surface(lambda d: 1e-3, [1e9, 4e9], seeds=2, policy="adamh"):
        rate, tokens, loss, *_, seed, policy = line.split(",")
        rows.append(f"{policy},{rate},{seed},1,{tokens},{loss},{loss},False,9,1,{float(rate) / 30}")
    rows.append("adamh,1,0,1,1e9,inf,inf,True,9,1,")
    (tmp_path / "runs.csv").write_text("\n".join([header, *rows]) + "\n")

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, str(ROOT / "tools/extrapolate_lr.py"), *arguments],
            cwd=tmp_path,
            env={"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )

    done = run(".", "--tokens", "1e10")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "adamh: 21 runs" in done.stdout
    assert "1 diverged" in done.stdout
    assert done.stdout.strip() == (tmp_path / "extrapolation/extrapolation.txt").read_text().strip()
    (tmp_path / "empty").mkdir()
    refused = run("empty")
    assert refused.returncode == 1
    assert "empty has no runs.csv, so it is not the folder of a grid" in refused.stderr
