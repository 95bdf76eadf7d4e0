"""tools/compare.py on real jobs: interrupted, resumed, a diverged run, the report."""

import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import yaml

from megatron_llr.telemetry.read_logs import rates_by_role
from megatron_llr.tools.compare.planning import measured_roles

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
    deadline = time.monotonic() + 1800
    while not second_log.exists() and first.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
    assert done.exists()
    first.send_signal(signal.SIGTERM)
    output, _ = first.communicate(timeout=1800)
    assert first.returncode == 143, output
    assert "Finished runs are kept; the same command runs the others" in output
    assert "stopped by SIGTERM" in output
    assert "Traceback" not in output
    assert children_of(out) == []
    written = done.stat().st_mtime_ns

    again = compare(grid)
    output, _ = again.communicate(timeout=1800)
    assert again.returncode == 0, output
    assert "1 of 2 runs are already done" in output
    assert "[2/2] huge, lr 0.001, seed 5: diverged" in output
    assert "diverged at 0.001: 1 of 1" in output
    assert "FLAGGED" not in output
    assert done.stat().st_mtime_ns == written
    assert json.loads(done.read_text())["died_of_nan"] is False
    assert (out / "table.txt").read_text().strip() in output


def test_the_rate_of_each_role_is_scaled_around_the_control(tmp_path: Path) -> None:
    """The control first; the runs of the sweep follow from it, at its best rate."""
    out = tmp_path / "out"
    content = {
        "out": str(out),
        "learning_rates": [1e-3],
        "iterations": [8],
        "seeds": [5],
        "policies": {"uniform": "--llr-policy uniform"},
        "sensitivity": {"factors": [0.5], "roles": ["embedding", "k"]},
        "flags": FLAGS.replace("--train-iters 8", ""),
    }
    path = tmp_path / "grid.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    tool = compare(path)
    output, _ = tool.communicate(timeout=1800)
    assert tool.returncode == 0, output
    assert "[3/3] uniform, k x 0.5, 8 updates, lr 0.001, seed 5: validation" in output
    assert "sensitivity to the rate of each role, around uniform:" in output
    assert "FLAGGED" not in output
    base = out / "uniform" / "iters-8" / "lr-0.001" / "seed-5"
    scaled = out / "sensitivity" / "k-0.5" / "uniform" / "iters-8" / "lr-0.001" / "seed-5"
    # The head is tied to the embedding.
    roles = ["embedding", "q", "k", "v", "o", "up", "down"]
    assert measured_roles(base) == roles
    by_folder = [rates_by_role(folder, "learning_rate") for folder in (base, scaled)]
    for role in roles:
        for update in (4, 8):
            ratio = by_folder[1][role][update].mean / by_folder[0][role][update].mean
            assert abs(ratio - (0.5 if role == "k" else 1.0)) < 1e-9
    with (out / "sensitivity.csv").open() as file:
        rows = {row["role"]: row for row in csv.DictReader(file)}
    assert rows.keys() == {"embedding", "k"}
    for row in rows.values():
        # With one factor the slope is that of the line through both losses.
        change = float(row["change_0.5"])
        assert abs(float(row["slope"]) + change / math.log(2)) < 1e-9
    assert (out / "sensitivity.png").stat().st_size > 1000
    with (out / "runs.csv").open() as file:
        (run,) = csv.DictReader(file)
    # Rate over norm: the rate is at most 1e-3, the norms of these matrices are 1 to 3.
    assert 1e-5 < float(run["effective_learning_rate"]) < 1e-3


def test_the_study_of_lengths_runs_at_a_tiny_size(tmp_path: Path) -> None:
    """examples/lr_over_tokens.yaml with other data, fewer updates and one rate."""
    content = yaml.safe_load((ROOT / "examples" / "lr_over_tokens.yaml").read_text())
    data = "--data-path runs/stdlib/data --split 98,2,0"
    assert data in content["flags"]
    content["flags"] = content["flags"].replace(data, "--mock-data --split 90,10,0")
    content |= {"out": str(tmp_path / "out"), "iterations": [6, 12], "seeds": [1], "extend": False}
    content["learning_rates"] = content["learning_rates"][:1]
    path = tmp_path / "grid.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    tool = compare(path)
    output, _ = tool.communicate(timeout=1800)
    assert tool.returncode == 0, output
    assert "FLAGGED" not in output
    with (tmp_path / "out" / "runs.csv").open() as file:
        rows = list(csv.DictReader(file))
    # AdamH's own rate is 13/3 of the one tried, over norms that stay those of the start.
    for policy, largest in (("adamw", 1e-3), ("adamh", 5e-3)):
        own = [row for row in rows if row["policy"] == policy]
        assert [row["tokens"] for row in own] == [str(6 * 6 * 128), str(12 * 6 * 128)]
        assert all(1e-6 < float(row["effective_learning_rate"]) < largest for row in own)
    assert len(rows) == 4
    tool = subprocess.run(
        [sys.executable, "tools/extrapolate_lr.py", str(tmp_path / "out")],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert tool.returncode == 1
    assert "adamh has 2 numbers of tokens, 0 with an optimum" in tool.stderr
    assert tool.stderr.count("\n") == 1


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
