"""A rank ends with its launcher, from before it imports torch."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
RANK = """
import sys, time
from megatron_llr.megatron import process_end
process_end.end_with_launcher()
assert "torch" not in sys.modules
print("begun", flush=True)
time.sleep(1800)
"""
ORDER = """
import sys
from megatron_llr.megatron import process_end
calls = []
process_end.end_with_launcher = lambda: calls.append("torch" in sys.modules)
import megatron_llr.megatron.pretrain
assert calls == [False], calls
"""
VARIABLES = {**os.environ, "PYTHONPATH": str(ROOT), "TORCHELASTIC_RUN_ID": "1"}


def test_a_rank_ends_with_a_killed_launcher() -> None:
    start = "import subprocess, sys; subprocess.run(sys.argv[1:])"
    launcher = subprocess.Popen(
        [sys.executable, "-c", start, sys.executable, "-c", RANK],
        env=VARIABLES,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert launcher.stdout is not None
    try:
        assert launcher.stdout.readline() == "begun\n"
        (rank,) = psutil.Process(launcher.pid).children()
    finally:
        launcher.send_signal(signal.SIGKILL)
        launcher.communicate(timeout=1800)
    rank.wait(timeout=1800)


def test_the_program_asks_for_it_before_it_imports_torch() -> None:
    subprocess.run([sys.executable, "-c", ORDER], env=VARIABLES, check=True, timeout=1800)
