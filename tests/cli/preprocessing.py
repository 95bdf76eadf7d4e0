"""What the tests of tools/preprocess_data.py share."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import IO

from tests.forked import run_forked

ROOT = Path(__file__).resolve().parents[2]
TOOL = [sys.executable, "tools/preprocess_data.py"]
_IMPORTED = ("megatron.core.datasets.indexed_dataset", "transformers")
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def forked(
    *arguments: object,
    stdin: IO[bytes] | bytes = b"",
    limit: Callable[[], None] | None = None,
) -> "subprocess.CompletedProcess[str]":
    """A program in a process that need not import what the tool needs."""
    for module in _IMPORTED:
        import_module(module)
    return run_forked(arguments, cwd=ROOT, env=ENVIRONMENT, stdin=stdin, limit=limit)


def preprocess(
    *arguments: object,
    stdin: IO[bytes] | bytes = b"",
    limit: Callable[[], None] | None = None,
) -> "subprocess.CompletedProcess[str]":
    """Run the tool."""
    return forked(*TOOL[1:], *arguments, stdin=stdin, limit=limit)


def peak_memory(*arguments: object) -> int:
    """Bytes of memory that the tool used at its peak; it must succeed."""
    # Not `ru_maxrss`, which a child inherits from its parent. The memory of this process counts,
    # and is the same in every call.
    program = (
        "import re, sys\n"
        "from pathlib import Path\n"
        "from megatron_llr.tools.preprocess import cli\n"
        "code = cli.main(sys.argv[1:])\n"
        "print(re.search(r'VmHWM:\\s*(\\d+) kB', Path('/proc/self/status').read_text())[1])\n"
        "sys.exit(code)\n"
    )
    done = forked("-c", program, *arguments)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.splitlines()[-1]) * 1024


def write_jsonl(path: Path, texts: list[str], key: str = "text") -> Path:
    path.write_text("".join(json.dumps({"id": 1, key: text}) + "\n" for text in texts))
    return path


def assert_nothing_left(folder: Path, *allowed: str) -> None:
    assert sorted(path.name for path in folder.iterdir()) == sorted(allowed)
