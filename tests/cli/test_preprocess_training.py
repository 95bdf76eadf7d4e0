"""Megatron trains with the flags that tools/preprocess_data.py prints, and after its remedies."""

import json
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_llr.tools.preprocess.split import DEFAULT_SPLIT, documents_per_part, split_flags
from tests.cli.preprocessing import ENVIRONMENT, ROOT, preprocess, write_jsonl

MODEL = (
    "--llr-device cpu --num-layers 1 --hidden-size 64 --ffn-hidden-size 64 "
    "--num-attention-heads 2 --seq-length 8 --max-position-embeddings 8 --swiglu "
    "--normalization RMSNorm --position-embedding-type rope --disable-bias-linear "
    "--untie-embeddings-and-output-weights --micro-batch-size 1 --global-batch-size 2 --lr 1e-3 "
    "--train-iters 4 --eval-interval 4 --eval-iters 1 --log-interval 1 "
    "--llr-interval 2 --llr-ramp-iters 1 --llr-active-fraction 1.0"
).split()


def train(flags: list[str], folder: Path) -> str:
    """Train one process with these flags; returns what it printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    job = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    done = subprocess.run(
        [
            *(sys.executable, "pretrain_gpt_llr.py", *MODEL),
            *("--data-cache-path", str(folder / "cache"), *flags),
        ],
        cwd=ROOT, env={**ENVIRONMENT, **job, "MASTER_ADDR": "localhost", "MASTER_PORT": port},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=1800,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout


def make_tokenizer(folder: Path, **special: str) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "end", "a", "few", "words"]
    raw = Tokenizer(
        models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>")
    )
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=raw, **special).save_pretrained(folder)
    return folder


# Tokenizer's special tokens (None: bytes), further flags of the tool, documents, parts evaluated.
RUNS: dict[str, tuple[dict[str, str] | None, list[str], int, list[str]]] = {
    "bytes, one document": (None, [], 1, []),
    "eos_token, two documents": ({"eos_token": "end"}, [], 2, ["validation"]),
    "sep_token, three documents": ({"sep_token": "end"}, [], 3, ["validation", "test"]),
    "no end, 40 documents": ({}, ["--no-append-eod"], 40, ["validation", "test"]),
    "bytes, 600 documents": (None, [], 600, ["validation", "test"]),
}


@pytest.mark.parametrize("name", RUNS)
def test_the_printed_flags_train(name: str, tmp_path: Path) -> None:
    special, flags, documents, parts = RUNS[name]
    if special is not None:
        flags = [*flags, "--tokenizer", str(make_tokenizer(tmp_path / "my tokenizer", **special))]
    source = write_jsonl(tmp_path / "in.jsonl", ["a few words"] * documents)
    done = preprocess(source, "--output", tmp_path / "my set", *flags)
    assert done.returncode == 0, done.stderr
    assert ("megatron_llr: The dataset has" in done.stderr) == (documents < 600)
    printed = done.stdout.splitlines()[-1].removeprefix("train on it with: ")
    output = train(shlex.split(printed), tmp_path)
    assert "iteration        4/       4" in output
    for part in ("validation", "test"):
        assert (f"on {part} set | lm loss value" in output) == (part in parts)


def test_a_tokenizer_without_an_end_of_document_token(tmp_path: Path) -> None:
    """The error's first remedy; `--no-append-eod` is trained above."""
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    source = write_jsonl(tmp_path / "in.jsonl", ["a few words"] * 3)
    arguments = (source, "--output", tmp_path / "set", "--tokenizer", tokenizer)
    done = preprocess(*arguments)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "has no end-of-document token. It must have an eos_token or a sep_token" in line
    assert 'Set "eos_token" in its tokenizer_config.json to a token of its vocabulary' in line
    assert "another --tokenizer, or set --no-append-eod" in line
    config = json.loads((tokenizer / "tokenizer_config.json").read_text())
    (tokenizer / "tokenizer_config.json").write_text(json.dumps({**config, "eos_token": "end"}))
    done = preprocess(*arguments)
    assert done.returncode == 0, done.stderr
    assert "--tokenizer-type HuggingFaceTokenizer" in done.stdout
    train(shlex.split(done.stdout.splitlines()[-1].removeprefix("train on it with: ")), tmp_path)


def test_every_number_of_documents_gets_a_split_without_empty_parts() -> None:
    for documents in [*range(1, 700), 10_000, 1_000_000]:
        flags, warning = split_flags(documents)
        split = flags.split()[1] if flags else DEFAULT_SPLIT
        parts = documents_per_part(split, documents)
        assert sum(parts) == documents
        wanted = [share != "0" for share in split.split(",")]
        assert [part > 0 for part in parts] == wanted
        assert wanted == [True, documents > 1, documents > 2]
        assert bool(flags) == bool(warning)
        if documents > 2:
            assert parts[0] >= parts[1]
