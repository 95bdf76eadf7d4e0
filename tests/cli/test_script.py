"""The script as users start it: processes of its own, torchrun, two nodes."""

import csv
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MODEL = (
    "--num-layers 2 --hidden-size 64 --ffn-hidden-size 96 --num-attention-heads 2 --seq-length 16 "
    "--max-position-embeddings 16 --swiglu --normalization RMSNorm --position-embedding-type rope "
    "--disable-bias-linear --untie-embeddings-and-output-weights --mock-data --vocab-size 100 "
    "--tokenizer-type NullTokenizer --micro-batch-size 1 --global-batch-size 2 --lr 1e-3 "
    "--train-iters 4 --split 99,1,0 --eval-iters 0 --eval-interval 9 --log-interval 1 "
    "--llr-device cpu --llr-interval 2 --llr-ramp-iters 1 --llr-active-fraction 1.0"
).split()


def environment() -> dict[str, str]:
    drop = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {name: value for name, value in os.environ.items() if name not in drop}
    return {**kept, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}


def torchrun(*flags: str, launch: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    start = launch or ("--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0")
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "torch.distributed.run", *start),
            *("pretrain_gpt_llr.py", *MODEL, *flags),
        ],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    output, _ = process.communicate(timeout=1800)
    return process.returncode, output


def test_two_nodes_of_two_ranks(tmp_path: Path) -> None:
    """Two torchrun agents, one rendezvous on the loopback: TP inside each, DP across both."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    nodes = []
    for node in (0, 1):
        launch = (
            f"--nnodes 2 --nproc-per-node 2 --rdzv-backend c10d --rdzv-id two --node-rank {node}"
        )
        launch += f" --rdzv-endpoint 127.0.0.1:{port} --local-addr 127.0.0.1"
        flags = "--tensor-model-parallel-size 2 --use-distributed-optimizer --llr-log-dir"
        nodes.append(torchrun(*flags.split(), str(tmp_path / "log"), launch=tuple(launch.split())))
    results = [finish(node) for node in nodes]
    for code, output in results:
        assert code == 0, output[-3000:]
    printed = "".join(output for _, output in results)
    assert printed.count("measured 14 matrices before update 1 ") == 1
    assert "iteration        4/       4" in printed
    with (tmp_path / "log" / "learning_rates.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 4 * 16


def test_dry_run_ends_with_code_0() -> None:
    code, output = finish(torchrun("--llr-dry-run"))
    assert code == 0, output[-3000:]
    assert "block.1.mlp.down" in output
    assert "iteration        1/" not in output


def test_a_wrong_flag_ends_with_one_line() -> None:
    code, output = finish(torchrun("--llr-ramp-iters", "9"))
    assert code != 0
    lines = [line for line in output.splitlines() if "ValueError: megatron_llr: --llr-" in line]
    assert lines
    assert (
        "--llr-ramp-iters 9 is not valid. It must be from 0 to 1, less than --llr-interval."
        in lines[0]
    )


def test_cuda_is_refused_where_there_is_none() -> None:
    code, output = finish(torchrun("--llr-device", "cuda"))
    assert code != 0
    assert "--llr-device cuda needs a GPU, and torch sees none on this machine" in output


@pytest.mark.parametrize(("gpus", "loaded"), [(True, False), (False, True)])
def test_with_a_gpu_the_cpu_module_is_never_imported(gpus: bool, loaded: bool) -> None:
    """Torch is made to answer as with a GPU; nothing else of CUDA is touched before the choice."""
    program = (
        "import sys, torch\n"
        f"torch.cuda.is_available = lambda: {gpus}\n"
        "from megatron_llr.megatron import launch\n"
        "arguments = launch.prepare_device(['--lr', '1'])\n"
        f"assert ('megatron_llr.cpu.emulation' in sys.modules) is {loaded}\n"
        f"assert ('--distributed-backend=gloo' in arguments) is {loaded}\n"
        "assert arguments[-2:] == ['--lr', '1']\n"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], cwd=ROOT, text=True)
    assert done.returncode == 0


def test_the_script_holds_no_logic() -> None:
    assert len((ROOT / "pretrain_gpt_llr.py").read_text().splitlines()) < 120


def test_half_of_transformer_engine_is_explained(tmp_path: Path) -> None:
    """Its Python package alone: one line, before megatron's own import fails on it."""
    (tmp_path / "transformer_engine").mkdir()
    (tmp_path / "transformer_engine" / "__init__.py").write_text("raise FileNotFoundError('so')")
    process = subprocess.run(
        [sys.executable, "-W", "ignore", "pretrain_gpt_llr.py", "--llr-device", "cpu"],
        cwd=ROOT,
        env={**environment(), "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    assert process.returncode != 0
    assert "Transformer Engine is only partially installed" in process.stderr
    assert "transformer_engine_torch" in process.stderr
