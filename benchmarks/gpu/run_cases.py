"""Runs the cases one after another: a time limit for each and a budget for all."""

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

from benchmarks.gpu.plan import Case
from megatron_llr.output import replaced_file

ROOT = Path(__file__).resolve().parents[2]

# A process needs this long to import torch and megatron. With less, no case is started.
_LEAST_SECONDS = 15
# In the message of `flags.refuse_unsupported`.
_REFUSAL = "is not supported yet"


@dataclass(frozen=True)
class Outcome:
    """How one case ended.

    Attributes:
        name: that of the case.
        status: ok, failed, refused (by this package, by the name of a flag), timeout, skipped or
            not run.
        reason: why it is not ok, in one line.
        seconds: its wall time, including its start.
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


# Lines of a logger, which can interrupt or follow a traceback: [W1127 10:00:00 file.cpp:1] ...
_LOG_LINE = re.compile(r"\[?[IWEF]\d{4,8} ")
_RANK = re.compile(r"\[(?:rank|default)\d+\]: ?")
_FRAME = re.compile(r'File "(?:.*/)?([^/"]+)", line (\d+)')
# An error without a traceback: an exception's name, or a program's own line as argparse prints it.
_ERROR_LINE = re.compile(r"(?:[\w.]*(?:Error|Exception|Exit)|[\w./]+: error|error): .+")
# A traceback after these lines is not what ended the process.
_NOT_FATAL = ("Exception ignored in", "Exception in thread")


def _exceptions(lines: Sequence[str]) -> list[str]:
    """The last line of every traceback, those that did not end the process first."""
    fatal, others = [], []
    inside, frame, before = False, "", ""
    for line in lines:
        if line.startswith("Traceback (most recent call last)"):
            inside, frame = True, ""
            kind = others if before.startswith(_NOT_FATAL) else fatal
        elif inside and line.startswith(" "):
            at = _FRAME.search(line)
            frame = f"{at[1]}, line {at[2]}" if at else frame
        elif inside:
            kind.append(line if ": " in line or not frame else f"{line} ({frame})")
            inside = False
        before = line
    return [*others, *fatal]


def error_in(text: str) -> str:
    """The error in the output of a failed process.

    That is the exception of the last traceback; else the last line that reports an error; else the
    last line. Warnings of NCCL or of a launcher can follow the traceback and are not the reason.
    """
    lines = [_RANK.sub("", line.rstrip()) for line in text.splitlines() if line.strip()]
    lines = [line for line in lines if not _LOG_LINE.match(line)] or lines
    errors = _exceptions(lines) or [line for line in lines if _ERROR_LINE.fullmatch(line)]
    return (errors or lines or ["no output"])[-1].strip()[:300]


def _kill_group(process: "subprocess.Popen[bytes]") -> None:
    """End a case and its child processes: it leads its own process group."""
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
        command = [sys.executable, "-m", "benchmarks.gpu.case_process", str(given), str(result)]
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
                _kill_group(process)
                took = time.perf_counter() - begun
                return Outcome(case.name, "timeout", f"stopped after {seconds:.0f} s", took)
            except BaseException:
                _kill_group(process)
                raise
        took = time.perf_counter() - begun
        if code != 0 or not result.exists():
            error = error_in(log.read_text(errors="replace"))
            status = "refused" if _REFUSAL in error else "failed"
            return Outcome(case.name, status, f"exit code {code}: {error}", took)
        answer = json.loads(result.read_text())
        if "unavailable" in answer:
            return Outcome(case.name, "skipped", answer["unavailable"], took)
        return Outcome(case.name, "ok", "", took, answer["result"])


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
        elif case.gpu_only and device != "cuda":
            outcome = Outcome(case.name, "skipped", "needs a GPU")
        elif left < _LEAST_SECONDS:
            outcome = Outcome(case.name, "not run", f"the budget of {budget:.0f} s was spent")
        else:
            seconds = min(float(case.seconds), left)
            outcome = run_case(case, device, seconds, folder / f"{case.name}.log")
        with replaced_file(folder / f"{case.name}.json") as partial:
            partial.write_text(json.dumps(asdict(outcome), indent=1) + "\n")
        outcomes.append(outcome)
        say(f"{case.name}: {outcome.status} ({outcome.seconds:.0f} s) {outcome.reason}".rstrip())
    return outcomes
