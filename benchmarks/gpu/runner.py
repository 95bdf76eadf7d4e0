"""Runs cases one after the other, each within its own time and all within the budget."""

import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.plan import Case

ROOT = Path(__file__).resolve().parents[2]

# A process needs this long to import torch and megatron: less is not worth beginning.
_LEAST_SECONDS = 15
# What `training.arguments.refuse_unsupported` says.
_REFUSAL = "is not supported yet"


@dataclass(frozen=True)
class Outcome:
    """What became of one case.

    Attributes:
        name: that of the case.
        status: ok, failed, refused (by this package, by the name of a flag), timeout, skipped or
            not run.
        reason: why it is not ok, in one line.
        seconds: that it took, its start included.
        result: what its function returned.
    """

    name: str
    status: str
    reason: str = ""
    seconds: float = 0.0
    result: dict[str, Any] = field(default_factory=dict)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])


def _environment() -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "PYTHONWARNINGS": "ignore",
        # A job of one rank needs no launcher.
        **{"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"},
        **{"MASTER_ADDR": "localhost", "MASTER_PORT": str(_free_port())},
        # As Megatron's --deterministic-mode wants them, for all cases alike.
        **{"NCCL_ALGO": "Ring", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"},
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        # Megatron compiles its fused activations when it starts; none of them is used here.
        "TORCHDYNAMO_DISABLE": "1",
    }


# The line that names an exception at the end of a traceback; torch puts the rank before it.
_EXCEPTION = re.compile(r"(?:\[rank\d+\]: ?)?((?:[A-Za-z_]\w*\.)*\w*(?:Error|Exception|Exit)\b.*)")


def error_in(text: str) -> str:
    """The error in the output of a failed process: the last exception, not what was printed later.

    Warnings of NCCL and of a launcher that notices the failure follow the traceback. Without a
    traceback, the last line.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [match[1] for line in lines if (match := _EXCEPTION.fullmatch(line))]
    return (errors or lines or ["no output"])[-1][:300]


def _stop(process: "subprocess.Popen[bytes]") -> None:
    """End a case and whatever it started: it leads a process group of its own."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run_case(case: Case, device: str, seconds: float, log: Path) -> Outcome:
    """Run one case to its end, or to the end of its time.

    Args:
        case: what to run.
        device: cuda or cpu.
        seconds: at most.
        log: file for what it prints.
    """
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        given, result = Path(folder, "case.json"), Path(folder, "result.json")
        given.write_text(json.dumps({**asdict(case), "device": device}))
        command = [sys.executable, "-m", "benchmarks.gpu.child", str(given), str(result)]
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=_environment(),
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                code = process.wait(timeout=seconds)
            except subprocess.TimeoutExpired:
                _stop(process)
                took = time.perf_counter() - begun
                return Outcome(case.name, "timeout", f"stopped after {seconds:.0f} s", took)
            except BaseException:
                _stop(process)
                raise
        took = time.perf_counter() - begun
        if code != 0 or not result.exists():
            error = error_in(log.read_text(errors="replace"))
            status = "refused" if _REFUSAL in error else "failed"
            return Outcome(case.name, status, f"exit code {code}: {error}", took)
        return Outcome(case.name, "ok", "", took, json.loads(result.read_text()))


def run_all(
    cases: Sequence[Case], device: str, budget: float, folder: Path, say: Callable[[str], None]
) -> list[Outcome]:
    """Run the cases in order; a case that fails leaves a reason, and the rest goes on.

    Args:
        cases: what to run.
        device: cuda or cpu.
        budget: seconds for all together.
        folder: for a JSON file and a log per case.
        say: prints a line.
    """
    begun = time.perf_counter()
    outcomes = []
    for case in cases:
        left = budget - (time.perf_counter() - begun)
        if case.needs is not None and importlib.util.find_spec(case.needs) is None:
            outcome = Outcome(case.name, "skipped", f"{case.needs} is not installed")
        elif device == "cuda" and torch.cuda.get_device_capability() < case.capability:
            needed = ".".join(map(str, case.capability))
            outcome = Outcome(case.name, "skipped", f"needs compute capability {needed}")
        elif left < _LEAST_SECONDS:
            outcome = Outcome(case.name, "not run", f"the budget of {budget:.0f} s was spent")
        else:
            seconds = min(float(case.seconds), left)
            outcome = run_case(case, device, seconds, folder / f"{case.name}.log")
        (folder / f"{case.name}.json").write_text(json.dumps(asdict(outcome), indent=1) + "\n")
        outcomes.append(outcome)
        say(f"{case.name}: {outcome.status} ({outcome.seconds:.0f} s) {outcome.reason}".rstrip())
    return outcomes
