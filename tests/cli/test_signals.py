"""How tools end on signals and closed pipes: exit code, no traceback, no partial output."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cli.preprocessing import ENVIRONMENT, ROOT, TOOL, assert_nothing_left, write_jsonl

STAGED = """
import sys, time
from pathlib import Path
from megatron_llr.output import staged_folder
from megatron_llr.tools.entry_point import run_tool

def main():
    with staged_folder(Path(sys.argv[1])) as folder:
        (folder / "half").write_text("x")
        print("ready", flush=True)
        time.sleep(60)
    return 0

sys.exit(run_tool(main))
"""


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_a_signal_removes_the_staged_folder(
    number: signal.Signals, code: int, tmp_path: Path
) -> None:
    tool = subprocess.Popen(
        [sys.executable, "-c", STAGED, str(tmp_path / "out")],
        cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert tool.stdout is not None
    assert tool.stdout.readline() == "ready\n"
    tool.send_signal(number)
    tool.send_signal(number)
    _, errors = tool.communicate(timeout=1800)
    assert tool.returncode == code
    assert errors == f"-c: stopped by {number.name}\n"
    assert_nothing_left(tmp_path)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_terminal_signals_all_processes_of_the_preprocessing_tool(
    number: signal.Signals, code: int, tmp_path: Path
) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", ["x" * 1000] * 100_000)
    tool = subprocess.Popen(
        [*TOOL, str(source), "--output", str(tmp_path / "set"), "--workers", "2"],
        cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    written = tmp_path / "set.part.bin"
    while not (written.exists() and written.stat().st_size) and tool.poll() is None:
        time.sleep(0.01)
    os.killpg(tool.pid, number)
    _, errors = tool.communicate(timeout=1800)
    assert tool.returncode == code
    assert "Traceback" not in errors
    assert f"stopped by {number.name}" in errors
    assert_nothing_left(tmp_path, "in.jsonl")


@pytest.mark.parametrize("lines", [1, 100_000])
def test_a_closed_pipe_is_no_traceback(lines: int) -> None:
    program = (
        "import sys\n"
        "from megatron_llr.tools.entry_point import run_tool\n"
        f"sys.exit(run_tool(lambda: [print('line') for _ in range({lines})] and 0))"
    )
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=ENVIRONMENT, stdout=writer,
        stderr=subprocess.PIPE, text=True, timeout=1800,
    )  # fmt: skip
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")
