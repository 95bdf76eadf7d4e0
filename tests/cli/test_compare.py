"""tools/compare.py on real jobs: interrupted, resumed, a diverged run, the report."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import yaml

ROOT = Path(__file__).resolve().parents[2]
FLAGS = (
    "--llr-device cpu --mock-data --tokenizer-type NullTokenizer --vocab-size 100 --split 90,10,0 "
    "--num-layers 2 --hidden-size 64 --ffn-hidden-size 96 --num-attention-heads 2 --seq-length 16 "
    "--max-position-embeddings 16 --normalization RMSNorm --position-embedding-type rope "
    "--micro-batch-size 2 --global-batch-size 2 --train-iters 8 --lr-warmup-iters 1 "
    "--eval-interval 4 --eval-iters 2 --log-interval 4 --llr-interval 2 --llr-ramp-iters 1"
)


def compare(grid: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "tools/compare.py", str(grid)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def children_of(folder: Path) -> list[str]:
    """Command lines of jobs that still write into a folder."""
    lines = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = entry.read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if str(folder) in line and "pretrain_gpt_llr" in line:
            lines.append(line)
    return lines


def test_an_interrupted_grid_resumes_and_a_diverged_run_is_a_result(tmp_path: Path) -> None:
    out = tmp_path / "out"
    (tmp_path / "huge.json").write_text('{"q": 1e30, "up": 1e30}')
    huge = f"--llr-policy fixed --llr-role-table {tmp_path / 'huge.json'}"
    content = {
        "out": str(out),
        "learning_rates": [1e-3],
        "seeds": [5],
        "policies": {"uniform": "--llr-policy uniform", "huge": huge},
        "flags": FLAGS,
    }
    grid = tmp_path / "grid.yaml"
    grid.write_text(yaml.safe_dump(content, sort_keys=False))
    first = compare(grid)
    done = out / "uniform" / "lr-0.001" / "seed-5" / "done.json"
    second_log = out / "huge" / "lr-0.001" / "seed-5" / "log.txt"
    deadline = time.monotonic() + 150
    while not second_log.exists() and first.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
    assert done.exists()
    first.send_signal(signal.SIGTERM)
    output, _ = first.communicate(timeout=60)
    assert first.returncode == 143, output
    assert "Finished runs are kept; the same command runs the others" in output
    assert "stopped by SIGTERM" in output
    assert "Traceback" not in output
    assert children_of(out) == []
    written = done.stat().st_mtime_ns

    again = compare(grid)
    output, _ = again.communicate(timeout=150)
    assert again.returncode == 0, output
    assert "1 of 2 runs are already done" in output
    assert "[2/2] huge, lr 0.001, seed 5: diverged" in output
    assert "diverged at 0.001: 1 of 1" in output
    assert "FLAGGED" not in output
    assert done.stat().st_mtime_ns == written
    assert json.loads(done.read_text())["died_of_nan"] is False
    assert (out / "table.txt").read_text().strip() in output


def test_the_character_data_are_split_as_published(tmp_path: Path) -> None:
    """The first 90 % to train on, ids in the order of the alphabet, no token between."""
    text = "To be, or not to be:\n" * 50
    (tmp_path / "text.txt").write_text(text)
    script = "examples/shakespeare_char/prepare.py"
    done = subprocess.run(
        [
            sys.executable,
            "-W",
            "ignore",
            script,
            str(tmp_path / "text.txt"),
            str(tmp_path / "data"),
        ],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    alphabet = sorted(set(text))
    assert json.loads((tmp_path / "data" / "alphabet.json").read_text()) == "".join(alphabet)
    assert f"--vocab-size {len(alphabet) + 1} " in done.stdout
    parts = [
        np.fromfile(tmp_path / "data" / f"{name}.bin", np.uint16) for name in ("train", "valid")
    ]
    assert len(parts[0]) == 945
    assert "".join(alphabet[token] for token in np.concatenate(parts)) == text
