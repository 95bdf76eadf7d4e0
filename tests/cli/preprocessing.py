"""What the tests of tools/preprocess_data.py share."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TOOL = [sys.executable, "tools/preprocess_data.py"]
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def preprocess(
    *arguments: object, limit: Callable[[], None] | None = None
) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [*TOOL, *map(str, arguments)],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=240,
        preexec_fn=limit,
    )


def peak_memory(*arguments: object) -> int:
    """Bytes of memory that the tool used at its peak; it must succeed."""
    tool = subprocess.Popen(
        [*TOOL, *map(str, arguments)], cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(tool.pid, 0)
    tool.returncode = os.waitstatus_to_exitcode(status)
    assert tool.returncode == 0
    return usage.ru_maxrss * 1024


def write_jsonl(path: Path, texts: list[str], key: str = "text") -> Path:
    path.write_text("".join(json.dumps({"id": 1, key: text}) + "\n" for text in texts))
    return path


def assert_nothing_left(folder: Path, *allowed: str) -> None:
    assert sorted(path.name for path in folder.iterdir()) == sorted(allowed)
