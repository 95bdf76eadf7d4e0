"""Helpers of the converter's tests."""

import io
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from megatron_llr.tools.convert.restricted_pickle import FileSlice, load_archive

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
        timeout=1800,
        check=False,
    )


def saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def replace_part(folder: Path, key: str, content: bytes) -> None:
    """Replace the content of one entry of a checkpoint, in a file of its own."""
    path = folder / ".metadata"
    index = pickle.loads(path.read_bytes())
    place = next(place for place in index.storage_data if place.fqn == key)
    (folder / "__9_0.distcp").write_bytes(content)
    part = index.storage_data[place]
    part.relative_path, part.offset, part.length = "__9_0.distcp", 0, len(content)
    path.write_bytes(pickle.dumps(index))


def edit_args(folder: Path, **changes: Any) -> None:
    """Change Megatron's args in a checkpoint that the converter wrote."""
    index = pickle.loads((folder / ".metadata").read_bytes())
    place = next(p for p in index.storage_data if p.fqn == "common_state/shard_0_1")
    part = index.storage_data[place]
    with FileSlice(folder / part.relative_path, part.offset, part.length) as file:
        (state,) = load_archive(file)
    for name, value in changes.items():
        setattr(state["args"], name, value)
    replace_part(folder, "common_state/shard_0_1", saved([state]))


def make_tokenizer(folder: Path, size: int, **special: str) -> Path:
    """A byte-level tokenizer of a number of tokens, of which the first three are special."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<s>", "</s>", "<pad>", *alphabet, *(f"<{n}>" for n in range(size))][:size]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", **special}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    return folder
