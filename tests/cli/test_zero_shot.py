"""examples/zero_shot.sh on an exported model, with the task that it makes itself."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.reference import families
from tests.unit.conversion import ROOT, make_tokenizer


def zero_shot(folder: Path, *flags: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": paths, **variables}
    return subprocess.run(
        ["bash", "examples/zero_shot.sh", str(folder), *flags],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1800, check=False,
    )  # fmt: skip


def test_the_local_task_needs_no_network(tmp_path: Path) -> None:
    """An accuracy of a few questions, in lm-eval's own file of results."""
    pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")
    folder = tmp_path / "hf"
    families.save(families.build("llama"), folder)
    make_tokenizer(folder, 250)
    # A proxy that refuses every connection, whatever a library would like to download.
    blocked = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"), "http://127.0.0.1:9")
    done = zero_shot(folder, "--limit", "5", TASKS="local", DEVICE="cpu", **blocked)
    assert done.returncode == 0, done.stderr[-3000:]
    (results,) = (folder / "zero_shot").rglob("results_*.json")
    accuracy = json.loads(results.read_text())["results"]["next_line"]["acc,none"]
    assert 0 <= accuracy <= 1
    assert (folder / "zero_shot" / "local_task" / "next_line.jsonl").read_text().count("\n") == 200


def test_the_questions_are_the_same_in_every_run(tmp_path: Path) -> None:
    for seed in ("1", "2"):
        subprocess.run(
            [sys.executable, "examples/zero_shot/make_local_task.py", tmp_path / seed, "20"],
            cwd=ROOT, env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)},
            check=True, capture_output=True,
        )  # fmt: skip
    one, two = ((tmp_path / seed / "next_line.jsonl").read_text() for seed in ("1", "2"))
    assert one == two
    for question in map(json.loads, one.splitlines()):
        assert len(question["choices"]) == len({*question["choices"]}) == 4
        assert 0 <= question["gold"] < 4


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    without = zero_shot(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    no_tokenizer = zero_shot(tmp_path)
    for done, expected in ((without, "no config.json in"), (no_tokenizer, "no tokenizer in")):
        assert done.returncode == 1
        assert done.stderr.count("\n") == 1
        assert expected in done.stderr
