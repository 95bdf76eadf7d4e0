"""The tokenizer's size, measured and exported: every tokenizer that Megatron can build offline."""

import base64
import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from harness import train

from megatron_llr.ranks import together
from megatron_llr.tools.convert.options import Options
from megatron_llr.tools.convert.to_hugging_face import to_hugging_face
from tests.unit.conversion import make_tokenizer, tensors


def hugging_face(folder: Path) -> str:
    make_tokenizer(folder / "tok", 261)
    return f"--tokenizer-model {folder / 'tok'}"


def sentence_piece(folder: Path) -> str:
    import sentencepiece

    (folder / "text").write_text(Path(base64.__file__).read_text())
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text"),
        model_prefix=str(folder / "sp"),
        vocab_size=200,
        model_type="bpe",
        minloglevel=2,
    )
    return f"--tokenizer-model {folder / 'sp.model'}"


def tiktoken(folder: Path) -> str:
    ranks = [
        {"rank": i, "token_bytes": base64.b64encode(bytes([i])).decode(), "token_str": chr(i)}
        for i in range(256)
    ]
    (folder / "tik.json").write_text(json.dumps(ranks))
    return (
        f"--tokenizer-model {folder / 'tik.json'} --vocab-size 266 --tiktoken-pattern v2 "
        "--tiktoken-num-special-tokens 10"
    )


# Flags, the size that Megatron counts, the end of a document, and the package that it needs.
# The others cannot train here: GPT2BPETokenizer and BertWordPiece* download a tokenizer,
# MultimodalTokenizer needs arguments that the pretraining script does not have, and Megatron's text
# datasets cannot be built with NullMultimodalTokenizer.
TOKENIZERS: dict[str, tuple[Callable[[Path], str], int, int | None, str | None]] = {
    "NullTokenizer": (lambda _: "--vocab-size 250", 250, 249, None),
    "HuggingFaceTokenizer": (hugging_face, 261, 1, None),
    "SFTTokenizer": (
        lambda f: hugging_face(f) + " --sft-tokenizer-prompt-format default",
        261,
        1,
        None,
    ),
    "SentencePieceTokenizer": (sentence_piece, 200, 2, "sentencepiece"),
    "TikTokenizer": (tiktoken, 266, 2, "tiktoken"),
}


@pytest.mark.world_size(1, 2, 4)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_measured_and_exported_rows_are_the_tokenizers(
    kind: str, tied: bool, shared_dir: Path
) -> None:
    """At every TP, whose padded sizes differ: 128 rows a rank."""
    make_flags, size, end, package = TOKENIZERS[kind]
    if package is not None and find_spec(package) is None:
        pytest.skip(f"needs {package}")
    world = dist.get_world_size()
    flags: list[Any] = [make_flags(shared_dir) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(flags)
    log = shared_dir / "log"
    run = train(
        f"--tokenizer-type {kind} {flags[0]} --make-vocab-size-divisible-by 128",
        f"--tensor-model-parallel-size {world} --exit-interval 1 --save-interval 1",
        f"--save {shared_dir / 'ck'} --llr-embedding measured --llr-log-dir {log}",
        tied=tied,
    )
    assert run.losses

    def check() -> None:
        if dist.get_rank() == 0:
            check_export(shared_dir, tied, kind, size, end)

    together(check)


def check_export(folder: Path, tied: bool, kind: str, size: int, end: int | None) -> None:
    lines = (folder / "log" / "measurements.csv").read_text().splitlines()
    header = lines[0].split(",")
    rows = [dict(zip(header, line.split(","), strict=True)) for line in lines[1:]]
    measured = {row["matrix"]: int(row["rows"]) for row in rows}
    assert measured["embedding"] == size
    assert tied or measured["head"] == size
    to_hugging_face(folder / "ck", folder / "hf", Options())
    config = json.loads((folder / "hf" / "config.json").read_text())
    assert (config["vocab_size"], config["eos_token_id"]) == (size, end)
    assert config["tie_word_embeddings"] == tied
    assert tensors(folder / "hf")["model.embed_tokens.weight"].shape[0] == size
    copied = (folder / "hf" / "tokenizer.json").is_file()
    assert copied == (kind in ("HuggingFaceTokenizer", "SFTTokenizer"))
