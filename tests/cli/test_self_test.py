"""tools/self_test.py as users start it: a whole run, a wrong environment, a stopped rank."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.cli.test_script import ROOT, environment

SCRIPT = str(ROOT / "tools" / "self_test.py")
# A launcher's own script: the second node has another setting of NCCL than the first.
ODD_NODE = (
    "import os, runpy, sys\n"
    "if os.environ['RANK'] == '1':\n"
    "    os.environ['NCCL_ALGO'] = 'Tree'\n"
    f"sys.argv[0] = {SCRIPT!r}\n"
    f"runpy.run_path({SCRIPT!r}, run_name='__main__')\n"
)


def start(
    folder: Path, *flags: str, ranks: int = 2, script: str = SCRIPT, **variables: str
) -> "subprocess.Popen[str]":
    """The self-test from a folder outside the repository."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", script, *flags]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [*command, "--device", "cpu", "--out", str(folder / "out" / "result.json")],
        cwd=folder,
        env={**environment(), "PYTHONPATH": path, "PYTHONWARNINGS": "ignore", **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def document(folder: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((folder / "out" / "result.json").read_text())
    return result


def left_over(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "out").iterdir())


def statuses(row: dict[str, Any]) -> list[str]:
    return [cell["status"] for cell in row["cells"].values()]


def test_every_check_passes_on_two_ranks(tmp_path: Path) -> None:
    job = start(tmp_path, "--only", "ep2-overlap-bf16,fp8-delayed")
    output, _ = job.communicate(timeout=1800)
    assert job.returncode == 0, output[-3000:]
    result = document(tmp_path)
    assert result["result"] == "ok"
    assert result["hosts"] == [result["environment"]["machine"]["host"]] * 2
    rows = {row["layout"]: row for row in result["rows"]}
    # Each preceded by the layout whose weights it loads.
    assert list(rows) == ["dp", "experts-distopt-bf16", "ep2-overlap-bf16", "fp8-delayed"]
    assert statuses(rows.pop("fp8-delayed")) == ["not applicable"] * 4
    assert statuses(rows["ep2-overlap-bf16"]) == ["ok"] * 4
    # Those that were not selected only save weights.
    weights = ["not run", "ok", "not run", "not run"]
    assert statuses(rows["dp"]) == statuses(rows["experts-distopt-bf16"]) == weights
    reference = rows["dp"]["cells"]["multipliers"]["note"]
    assert reference == "reference of the model: 30 matrices"
    assert rows["ep2-overlap-bf16"]["cells"]["multipliers"]["note"].startswith(
        "74 matrices, largest"
    )
    # Checkpoints and logs of a run without a failure are removed.
    assert left_over(tmp_path) == ["result.json"]
    lines = output.splitlines()
    assert any(line.startswith("layout ") for line in lines)
    assert lines[-1].startswith("ok after")
    assert "fp8-delayed: not applicable: FP8 needs a GPU" in lines


def test_every_check_passes_on_four_ranks(tmp_path: Path) -> None:
    """Tensor, sequence, pipeline and expert parallelism in one layout."""
    layouts = ["experts-distopt-bf16", "tp2-sp-pp2-ep2-distopt-bf16"]
    job = start(tmp_path, "--only", layouts[1], "--timeout", "240", ranks=4)
    output, _ = job.communicate(timeout=1800)
    assert job.returncode == 0, output[-3000:]
    rows = document(tmp_path)["rows"]
    assert [row["layout"] for row in rows] == layouts
    assert statuses(rows[1]) == ["ok"] * 4


def test_a_layout_that_fails_is_a_row_and_the_exit_code_is_1(tmp_path: Path) -> None:
    """Megatron refuses NCCL_ALGO=Tree in deterministic mode, on all ranks alike."""
    job = start(tmp_path, "--only", "dp-overlap-bf16", ranks=1, NCCL_ALGO="Tree")
    output, _ = job.communicate(timeout=1800)
    assert job.returncode == 1
    result = document(tmp_path)
    assert (result["result"], result["problems"]) == ("FAILED", [])
    source, row = result["rows"]
    assert statuses(source) == ["not run", "FAILED", "not run", "not run"]
    assert statuses(row) == ["FAILED"] * 4
    assert "NCCL_ALGO='Tree'" in row["cells"]["uniform"]["note"]
    assert row["cells"]["resume"]["note"] == "plain Megatron does not train on this layout"
    assert "Traceback" not in output.split("torch.distributed.elastic")[0].split("FAILED after")[0]
    assert left_over(tmp_path) == ["result.json", "result.logs"]
    log = (tmp_path / "out" / "result.logs" / "rank-0.log").read_text()
    assert "Traceback" in log


def test_an_error_on_one_rank_ends_the_job_with_its_text(tmp_path: Path) -> None:
    """The other rank waits for it in a collective."""
    odd = tmp_path / "odd_node.py"
    odd.write_text(ODD_NODE)
    job = start(tmp_path, "--only", "dp", script=str(odd))
    output, _ = job.communicate(timeout=1800)
    assert job.returncode == 1
    (problem,) = document(tmp_path)["problems"]
    assert problem.startswith("rank 1 on ")
    assert "failed: AssertionError: NCCL_ALGO='Tree'" in problem
    assert f"FAILED: {problem}" in output
    assert left_over(tmp_path) == ["result.json", "result.logs"]


def test_a_stopped_rank_is_named(tmp_path: Path) -> None:
    """SIGSTOP in the middle of a run; the limit is long enough for a busy machine."""
    job = start(tmp_path, "--only", "dp,dp-overlap-bf16", "--timeout", "45")
    log = tmp_path / "out" / "result.logs" / "rank-1.log"
    until = time.monotonic() + 1800
    while not (log.exists() and "iteration        1/" in log.read_text(errors="replace")):
        assert time.monotonic() < until
        assert job.poll() is None
        time.sleep(0.1)
    (rank,) = (
        child for child in psutil.Process(job.pid).children() if child.environ()["RANK"] == "1"
    )
    rank.send_signal(signal.SIGSTOP)
    assert job.stdout is not None
    lines = []
    for line in job.stdout:
        lines.append(line.rstrip())
        if line.startswith("FAILED after"):
            break
    # torchrun would wait half a minute for it.
    rank.kill()
    job.communicate(timeout=1800)
    assert job.returncode == 1
    (problem,) = document(tmp_path)["problems"]
    first, *others = problem.splitlines()
    assert first.startswith("rank 1 on ")
    assert "does not run" in first
    assert "(in dp: " in first
    assert "no progress within 45 s (--timeout)" in first
    assert [line.split(":")[0].strip() for line in others] == ["rank 0", "rank 1"]
    assert f"FAILED: {first}" in lines
    stopped, later = document(tmp_path)["rows"]
    assert stopped["cells"]["resume"]["note"] == "the job was stopped in this row"
    assert statuses(later) == ["not run"] * 4
    assert left_over(tmp_path) == ["result.json", "result.logs"]


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        (["--only", "tp2"], "layout tp2 needs a multiple of 2 ranks, and this job has 1"),
        (["--device", "cuda"], "needs a GPU|torch sees no GPU"),
        (["--out", "/proc/self_test.json"], "The folder of --out, /proc, is not writable"),
    ],
)
def test_a_wrong_flag_is_one_line(flags: list[str], error: str, tmp_path: Path) -> None:
    """Without a launcher the script is a job of one rank."""
    done = subprocess.run(
        [sys.executable, SCRIPT, *flags],
        cwd=tmp_path,
        env={**environment(), "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("self_test.py: megatron_llr: ")
    assert any(text in line for text in error.split("|"))
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []
