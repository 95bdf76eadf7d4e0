"""`make gpu`'s runner, on CPU at toy sizes: real cases, and what becomes of those that fail."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu.plan import Case, cases
from benchmarks.gpu.report import rows_of, table_of
from benchmarks.gpu.runner import Outcome, error_in, run_all
from benchmarks.gpu.stepping import many_experts

ROOT = Path(__file__).resolve().parents[2]
SIDES = {"hidden": 64, "ffn": 96, "blocks": 1, "seconds": 0.1}


def test_a_dry_run_trains_and_ends_with_the_table(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry-run", "--out", str(tmp_path)]
    command += ["--only", "bf16-plain,bf16-uniform,in-turn-60M"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (table,) = tmp_path.glob("cpu-*.md")
    assert done.stdout.endswith(table.read_text())
    assert "no figure here says anything" in table.read_text()
    assert "| same losses at multiplier 1: bf16, local layers | yes | 6 of 6 bit" in done.stdout
    assert "| step of 60M with / without |" in done.stdout
    found = json.loads((tmp_path / table.stem / "in-turn-60M.json").read_text())
    assert found["status"] == "ok"
    assert [len(found["result"]["seconds"][kind]) for kind in ("with", "without")] == [3, 3]
    assert found["result"]["measured"][0][0] == 14


def test_a_case_that_fails_leaves_its_reason_and_the_rest_goes_on(tmp_path: Path) -> None:
    chosen = [
        Case("broken", "matrices:measure", 60, {"colour": "red"}),
        Case("endless", "matrices:measure", 1, {**SIDES, "blocks": 10**9, "seconds": 10**9}),
        Case("lacking", "matrices:measure", 60, SIDES, needs="no_such_package"),
        Case("measure-60M", "matrices:measure", 60, SIDES),
    ]
    outcomes = run_all(chosen, "cpu", 200, tmp_path, lambda line: None)
    assert [outcome.status for outcome in outcomes] == ["failed", "timeout", "skipped", "ok"]
    assert "TypeError" in outcomes[0].reason
    assert "colour" in outcomes[0].reason
    assert outcomes[1].reason == "stopped after 1 s"
    assert outcomes[3].result["methods"] == ["gram64"]
    written = [json.loads((tmp_path / f"{case.name}.json").read_text()) for case in chosen]
    assert [case["status"] for case in written] == ["failed", "timeout", "skipped", "ok"]


def test_a_spent_budget_begins_nothing_more(tmp_path: Path) -> None:
    (outcome,) = run_all([Case("late", "matrices:measure", 60, SIDES)], "cpu", 5, tmp_path, print)
    assert (outcome.status, outcome.reason) == ("not run", "the budget of 5 s was spent")


def trained(name: str, losses: list[float], peak: int = 0) -> Outcome:
    return Outcome(name, "ok", result={"losses": losses, "peak_bytes": peak})


@pytest.mark.parametrize(
    ("plain", "ours", "figure"),
    [
        ([1.0, 2.0], [1.0, 2.0], "yes"),
        ([1.0, 2.0], [1.0, 2.0000000001], "NO"),
        ([1.0, 2.0], [1.0], "NO"),
        ([], [], "NO"),
        ([1.0, float("nan")], [1.0, float("nan")], "NO"),
    ],
)
def test_losses_are_the_same_to_the_bit_or_not(
    plain: list[float], ours: list[float], figure: str
) -> None:
    rows = rows_of([trained("bf16-plain", plain), trained("bf16-uniform", ours)])
    assert rows[0][:2] == ("same losses at multiplier 1: bf16, local layers", figure)


def test_the_share_of_time_is_that_of_a_measurement_every_100_steps() -> None:
    spent = {"with": [0.2], "without": [0.1], "optimizer with": [0.02], "optimizer without": [0.01]}
    step: dict[str, Any] = {"seconds": spent, "tokens": 1024, "measured": [], "stepping": []}
    block = {"block_seconds": 0.5, "measured_blocks": 2, "blocks": 20, "methods": ["gram32"]}
    block |= {"fp64_block_seconds": 1.0, "fp64_methods": ["gram64"]}
    outcomes = [
        Outcome("in-turn-1B", "ok", result=step),
        Outcome("measure-1B", "ok", result=block),
        Outcome("te-fp8-gather", "refused", "it | says so"),
    ]
    figures = {question: figure for question, figure, _ in rows_of(outcomes)}
    assert figures["step of 1B with / without"] == "200.00 / 100.00 ms"
    assert figures["measurement of 1B, all blocks"] == "10.00 s"
    assert figures["share of time of 1B at interval 100"] == "50.00%"
    assert figures["FP8 parameter gather"] == "-"
    assert "| te-fp8-gather refused: it \\| says so |" in table_of(outcomes, ["# here"])


def test_every_case_is_there_in_both_sizes_and_on_one_gpu_fits_in_its_time() -> None:
    toy, real = cases(toy=True), cases(toy=False)
    names = [case.name for case in real]
    assert names == [case.name for case in toy]
    assert len(set(names)) == len(names)
    assert max(case.seconds for case in real) <= 90


@pytest.mark.parametrize(
    ("log", "error"),
    [
        (
            "Traceback (most recent call last):\n  File 'x.py'\nRuntimeError: dim 1512 is odd\n"
            "[rank0]:[W1127 ProcessGroupNCCL.cpp:1524] Warning: destroy_process_group not called",
            "RuntimeError: dim 1512 is odd",
        ),
        (
            "[rank0]: Traceback (most recent):\n[rank0]: torch.OutOfMemoryError: CUDA out\n"
            "some Error: in the middle of a sentence, not an exception\nE1127 torchrun failed",
            "torch.OutOfMemoryError: CUDA out",
        ),
        ("ValueError: megatron_llr: --llr-interval is 0", None),
        ("killed", "killed"),
        ("", "no output"),
    ],
)
def test_the_reason_of_a_failure_is_its_error(log: str, error: str | None) -> None:
    assert error_in(log) == (error or log)


def test_every_case_has_a_row() -> None:
    """Also if it has no figure: then it has the reason."""
    for case in cases(toy=False):
        plain = "bf16-plain" if case.name in ("overlap-uniform", "updates-uniform") else ""
        partner = plain or case.name.replace("-uniform", "-plain")
        others = [trained(partner, [1.0])] if partner != case.name else []
        rows = rows_of([*others, Outcome(case.name, "failed", "reason of its own")])
        if not case.name.endswith("-plain"):
            assert any("reason of its own" in note for _, _, note in rows), case.name


def test_many_experts_are_stepped_with_and_without() -> None:
    result = many_experts("cpu", blocks=1, experts=3, steps=1)
    assert result["matrices"] == 9
    assert min(result["optimizers"]["torch AdamW"].values()) > 0
    assert result["optimizers"]["apex FusedAdam"] == {"skipped": "its kernel needs a GPU"}
