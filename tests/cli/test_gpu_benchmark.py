"""`make gpu` on CPU at toy sizes: real cases, cases that fail or cannot run, and the table."""

import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.gpu.fp8_recipes import RECIPES, why_unavailable
from benchmarks.gpu.plan import Case, cases
from benchmarks.gpu.result_table import rows_of, table_of
from benchmarks.gpu.run_cases import Outcome, error_in, run_all

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
MEASURED = {"model": "tiny", "repeats": 1}
# Time limits in these tests only end a process that hangs.
HANG = 3600


def test_a_dry_run_trains_and_ends_with_the_table(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry-run", "--out", str(tmp_path)]
    command += ["--only", "bf16-plain,bf16-uniform,in-turn-60M,in-turn-1B"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=HANG)
    assert done.returncode == 0, done.stdout + done.stderr
    (table,) = tmp_path.glob("cpu-*.md")
    assert done.stdout.endswith(table.read_text())
    assert "Dry run on CPU" in table.read_text()
    assert "| same losses at multiplier 1: bf16, local layers | yes | 6 of 6 bit" in done.stdout
    assert "| step of 60M with / without |" in done.stdout
    outcomes = {
        size: json.loads((tmp_path / table.stem / f"in-turn-{size}.json").read_text())
        for size in ("60M", "1B")
    }
    for outcome in outcomes.values():
        assert outcome["status"] == "ok"
        assert [len(outcome["result"]["seconds"][kind]) for kind in ("with", "without")] == [3, 3]
    assert outcomes["60M"]["result"]["measured"][0][0] == 14
    # Its FFN width is odd, and the exponents of the large models are invented.
    assert outcomes["1B"]["result"]["measured"] == []


def test_a_case_that_fails_leaves_its_reason_and_the_rest_goes_on(tmp_path: Path) -> None:
    function = "spectra:measure_all_blocks"
    chosen = [
        Case("broken", function, HANG, {"colour": "red"}),
        Case("endless", function, 1, {**MEASURED, "repeats": 10**9}),
        Case("lacking", function, HANG, MEASURED, needs="no_such_package"),
        Case("fp8", function, HANG, MEASURED, recipe="mxfp8"),
        Case("kernel", function, HANG, MEASURED, gpu_only=True),
        Case("measure-60M", function, HANG, MEASURED),
    ]
    outcomes = run_all(chosen, "cpu", math.inf, tmp_path, lambda line: None)
    statuses = ["failed", "timeout", "skipped", "skipped", "skipped", "ok"]
    assert [outcome.status for outcome in outcomes] == statuses
    assert "TypeError" in outcomes[0].reason
    assert "colour" in outcomes[0].reason
    assert outcomes[1].reason == "stopped after 1 s"
    expected = "FP8 recipe mxfp8 is not available on this card: FP8 needs a GPU"
    assert outcomes[3].reason == expected
    assert outcomes[4].reason == "needs a GPU"
    assert outcomes[5].result["methods"] == ["gram64"]
    assert outcomes[5].result["matrices"] == 14
    written = [json.loads((tmp_path / f"{case.name}.json").read_text()) for case in chosen]
    assert [case["status"] for case in written] == statuses
    ((_, figure, note),) = rows_of([Outcome("te-fp8-mxfp8-plain", "skipped", expected)])
    assert (figure, note) == ("-", f"te-fp8-mxfp8-plain skipped: {expected}")


def test_a_spent_budget_starts_no_case(tmp_path: Path) -> None:
    late = Case("late", "spectra:measure_all_blocks", HANG, MEASURED)
    (outcome,) = run_all([late], "cpu", 5, tmp_path, print)
    assert (outcome.status, outcome.reason) == ("not run", "the budget of 5 s was spent")


def test_thousands_of_experts_are_stepped_with_and_without_layer_groups(tmp_path: Path) -> None:
    (case,) = [case for case in cases(toy=True) if case.name == "many-experts"]
    (outcome,) = run_all([case], "cpu", math.inf, tmp_path, print)
    assert outcome.status == "ok", outcome.reason
    # 2 blocks of q, k, v, o, router and 4 experts of gate, up, down; embedding, position, head.
    assert outcome.result["matrices"] == 2 * (5 + 4 * 3) + 3
    rows = {question: note for question, _, note in rows_of([outcome])}
    (real,) = [case for case in cases(toy=False) if case.name == "many-experts"]
    assert real.arguments == {}
    assert len(rows) == 2
    assert all("37 matrices on one rank, GroupStepAdamW, ratio" in note for note in rows.values())


@pytest.mark.parametrize("recipe", RECIPES)
def test_transformer_engine_says_which_recipes_the_card_has(
    recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(available: bool, reason: str) -> Any:
        return lambda *, return_reason: (available, reason) if return_reason else available

    # Transformer Engine on a Hopper card. No test machine has one.
    engine = SimpleNamespace(
        is_fp8_available=answer(True, ""),
        is_fp8_block_scaling_available=answer(True, ""),
        is_mxfp8_available=answer(False, "Device compute capability 10.0 or higher required"),
    )
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", engine)
    reason = why_unavailable(recipe, "cuda")
    if recipe == "mxfp8":
        assert reason.startswith("FP8 recipe mxfp8 is not available on this card: Device compute")
    else:
        assert reason == ""


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
    blocks = {"batched_s": 10.0, "one_by_one_s": 20.0, "svdvals_s": 150.0, "blocks": 24}
    blocks |= {"matrices": 168, "batch": 34, "blocks_timed_one_by_one": 1, "methods": ["gram32"]}
    blocks |= {"all_fp64_s": 30.0, "fp64_methods": ["gram64"]}
    outcomes = [
        Outcome("in-turn-1B", "ok", result=step),
        Outcome("measure-1B", "ok", result=blocks),
        Outcome("te-fp8-gather", "refused", "it | says so"),
    ]
    figures = {question: figure for question, figure, _ in rows_of(outcomes)}
    assert figures["step of 1B with / without"] == "200.00 / 100.00 ms"
    assert figures["measurement of 1B, all blocks"] == "10.00 s"
    assert figures["measurement of 1B: svdvals in fp32 over batched"] == "15.00"
    assert figures["share of time of 1B at interval 100"] == "50.00%"
    assert figures["FP8 parameter gather"] == "-"
    assert "| te-fp8-gather refused: it \\| says so |" in table_of(outcomes, ["# here"])


def test_dry_runs_have_the_same_cases_without_time_limits() -> None:
    toy, real = cases(toy=True), cases(toy=False)
    names = [case.name for case in real]
    assert names == [case.name for case in toy]
    assert len(set(names)) == len(names)
    assert max(case.seconds for case in real) <= 90
    assert min(case.seconds for case in toy) > 10_000


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
        (
            "Traceback (most recent call last):\n  File 'x.py'\n"
            "[W1127 10:00:00 ProcessGroupNCCL.cpp:1524] Warning: in the middle\n"
            "    raise Unsupported\ntorch._dynamo.exc.Unsupported: a class of any name\n",
            "torch._dynamo.exc.Unsupported: a class of any name",
        ),
        (
            "Traceback (most recent call last):\n  File 'x.py'\nKeyError: 'the cause'\n\n"
            "During handling of the above exception, another exception occurred:\n\n"
            "Traceback (most recent call last):\n  File 'y.py'\nValueError: the last\n"
            "Exception ignored in: <function Pool.__del__>\nTraceback (most recent call last):\n"
            "  File 'pool.py'\nAttributeError: during exit\n",
            "ValueError: the last",
        ),
        (
            'Traceback (most recent call last):\n  File "/a/b/spectra.py", line 31, in f\n'
            "    assert n > 0\nAssertionError\n",
            "AssertionError (spectra.py, line 31)",
        ),
        (
            "usage: train [-h]\ntrain: error: unrecognized arguments: --odd\nE1127 torchrun failed",
            "train: error: unrecognized arguments: --odd",
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


def test_the_step_of_the_inner_optimizer_has_rows() -> None:
    """From the figures of a real run."""
    models = json.loads((RESULTS / "fused-adam-h200.json").read_text())["models"]
    result = {"torch": next(model for model in models if model["model"] == "350M")}
    rows = rows_of([Outcome("inner-step-350M", "ok", result=result)])
    title = "inner step() of 350M, a rate per matrix / one rate, torch fused"
    note = "ratio 0.969; 1.119 of the time to copy 28 bytes an element; 168 matrices"
    assert rows == [(title, "2.33 / 2.41 ms", note)]


def test_a_hyperball_step_is_timed_on_cpu_and_has_a_row(tmp_path: Path) -> None:
    (case,) = [case for case in cases(toy=True) if case.name == "hyperball-step-60M"]
    (outcome,) = run_all([case], "cpu", math.inf, tmp_path, print)
    assert outcome.status == "ok", outcome.reason
    result, times = outcome.result, outcome.result["milliseconds"]
    assert result["matrices"] == 2 * 7
    assert result["bytes an element"] == 40
    assert result["hyperball over floor"] == pytest.approx(times["hyperball"] / times["floor"])
    ((question, figure, note),) = rows_of([outcome])
    assert question == "inner step() of 60M, hyperball / plain AdamW"
    assert figure == f"{times['hyperball']:.2f} / {times['plain AdamW']:.2f} ms"
    assert "of the time to copy 40 bytes an element; 14 matrices" in note


def test_a_logged_step_has_rows() -> None:
    """From the figures of a real run."""
    models = json.loads((RESULTS / "logged-step-h200.json").read_text())["models"]
    spent = {"with": [0.2], "without": [0.175], "optimizer with": [0], "optimizer without": [0]}
    step: dict[str, Any] = {"seconds": spent, "tokens": 1024, "measured": [], "stepping": []}
    logged = Outcome("logged-step-350M", "ok", result=models[1])
    rows = rows_of([logged, Outcome("in-turn-350M", "ok", result=step)])
    question = "logged step of 350M over an unlogged one"
    assert rows[1:] == [
        (f"{question}, norms and rates", "1.0039", "0.68 ms, 5 launches"),
        (f"{question}, with updates", "1.0104", "1.82 ms, 9 launches"),
    ]
