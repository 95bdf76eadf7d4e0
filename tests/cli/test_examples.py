"""Examples that need no GPU run as they are; a GPU's runs with a tiny width on the CPU route."""

import subprocess
import sys
from pathlib import Path

from tests.cli.test_script import ROOT, environment

TINY = (
    "--llr-device cpu --num-layers 2 --hidden-size 64 --ffn-hidden-size 61 "
    "--num-attention-heads 2 --seq-length 16 --max-position-embeddings 16 --micro-batch-size 1 "
    "--global-batch-size 2 --train-iters 2 --lr-warmup-iters 0 --eval-iters 0 --split 99,1,0 "
    "--tokenizer-type NullTokenizer --vocab-size 257 --log-interval 1 --llr-interval 2 "
    "--llr-ramp-iters 1 --llr-active-fraction 1.0"
)


def run(script: str, *flags: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        ["bash", str(ROOT / "examples" / script), *flags],
        cwd=ROOT,
        env={**environment(), "PYTHON": sys.executable, **variables},
        capture_output=True,
        text=True,
        timeout=1800,
    )


def test_the_demo(tmp_path: Path) -> None:
    done = run("demo.sh", ITERS="20", RUN=str(tmp_path / "run"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "running: " in done.stderr
    assert "validation loss" in done.stdout.splitlines()[-1]
    assert (tmp_path / "run" / "learning_rates.png").is_file()


def test_a_model_of_the_paper_with_a_tiny_odd_width(tmp_path: Path) -> None:
    """With an apex that has none of its extensions: the job uses the norms of torch."""
    (tmp_path / "apex.py").write_text("")
    (tmp_path / "text.txt").write_text("a line of text\n" * 200)
    data = [sys.executable, "tools/preprocess_data.py", str(tmp_path / "text.txt")]
    data += ["--documents", "line", "--output", str(tmp_path / "data")]
    subprocess.run(data, cwd=ROOT, check=True, capture_output=True)
    done = run(
        "llama_1b.sh",
        *TINY.split(),
        DATA=str(tmp_path / "data"),
        TOKENIZER="none",
        GPUS="1",
        RUN=str(tmp_path / "run"),
        PYTHONPATH=f"{ROOT}:{tmp_path}",
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert "iteration        2/       2" in done.stdout
    assert (tmp_path / "run" / "learning_rates.csv").is_file()
