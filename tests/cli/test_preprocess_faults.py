"""tools/preprocess_data.py when a disk or a process fails: no partial output is left."""

import resource
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from tests.cli.preprocessing import (
    ENVIRONMENT,
    ROOT,
    TOOL,
    assert_nothing_left,
    forked,
    preprocess,
    write_jsonl,
)


def test_a_limit_on_file_size(tmp_path: Path) -> None:
    """The output fits into the write buffer but not on the disk: closing the file fails."""
    source = write_jsonl(tmp_path / "in.jsonl", ["x" * 30_000])
    done = preprocess(
        source, "--output", tmp_path / "set",
        limit=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000)),
    )  # fmt: skip
    assert done.returncode == 1
    assert "set: File too large" in done.stderr
    assert_nothing_left(tmp_path, "in.jsonl")


def test_a_dataset_that_differs_when_read_back_is_removed(tmp_path: Path) -> None:
    """The builder simulates a disk that changes a byte."""
    program = (
        "import sys\n"
        "from megatron_llr.tools.preprocess import cli\n"
        "cli._import_megatron()\n"
        "from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder\n"
        "finalize = IndexedDatasetBuilder.finalize\n"
        "def change(self, path):\n"
        "    finalize(self, path)\n"
        "    with open(self.data_file.name, 'r+b') as file:\n"
        "        file.write(b'?')\n"
        "IndexedDatasetBuilder.finalize = change\n"
        "sys.exit(cli.main(sys.argv[1:]))\n"
    )
    source = write_jsonl(tmp_path / "in.jsonl", ["abc"])
    done = forked("-c", program, source, "--output", tmp_path / "set")
    assert done.returncode == 1
    assert "set has (documents, tokens, bytes, checksum) (1, 4, 8, " in done.stderr
    assert_nothing_left(tmp_path, "in.jsonl")


@pytest.mark.parametrize("whom", ["the tool", "a worker"])
def test_stopped_from_outside(whom: str, tmp_path: Path) -> None:
    """SIGTERM to the tool, or SIGKILL to a worker (as when memory runs out): nothing is left."""
    # Much more than it can tokenize before the signal comes.
    source = write_jsonl(tmp_path / "in.jsonl", ["x" * 1000] * 200_000)
    process = subprocess.Popen(
        [*TOOL, str(source), "--output", str(tmp_path / "set"), "--workers", "2"],
        cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    written = tmp_path / "set.part.bin"
    while not (written.exists() and written.stat().st_size) and process.poll() is None:
        time.sleep(0.01)
    if whom == "the tool":
        process.terminate()
    else:
        children = psutil.Process(process.pid).children()
        next(child for child in children if "spawn_main" in str(child.cmdline())).kill()
    _, said = process.communicate(timeout=1800)
    assert process.returncode == (143 if whom == "the tool" else 1)
    assert whom == "the tool" or "A worker process was killed by SIGKILL" in said
    assert_nothing_left(tmp_path, "in.jsonl")
