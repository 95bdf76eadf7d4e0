"""Helpers of the converter's tests."""

import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    by_name: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        by_name |= load_file(file)
    return by_name


LIMITED = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from megatron_llr.megatron import model_chunks
from megatron_llr.tools.convert import cli, to_hugging_face, to_megatron
kind, limit, *arguments = sys.argv[1:]
if kind == "data":
    used = next(int(line.split()[1]) for line in open("/proc/self/status") if "VmData" in line)
    resource.setrlimit(resource.RLIMIT_DATA, (used * 1024 + int(limit),) * 2)
else:
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit),) * 2)
sys.exit(cli.main(arguments))
"""


def limited(kind: str, limit: int, *arguments: object) -> "subprocess.CompletedProcess[str]":
    """Run the command under a limit on the process's memory, or on the size of files."""
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LIMITED, kind, str(limit), *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
