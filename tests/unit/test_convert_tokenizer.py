"""Rows of the vocabulary, special tokens and tokenizer files of an exported model."""

import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from megatron_llr.tools.convert import cli
from megatron_llr.tools.convert.options import HUGGING_FACE
from tests.unit.conversion import ROOT, edit_args, make_tokenizer, tensors

EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture
def trained(checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint of 256 rows as training leaves it: no Hugging Face files next to it."""
    folder = Path(shutil.copytree(checkpoint, tmp_path / "trained"))
    shutil.rmtree(folder / HUGGING_FACE)
    return folder


def export(source: Path, target: Path, *flags: object) -> dict[str, Any]:
    """Convert; returns the config.json, after comparing it with the weights."""
    assert cli.main([str(source), str(target), *map(str, flags)]) == 0
    config: dict[str, Any] = json.loads((target / "config.json").read_text())
    assert tensors(target)[EMBEDDING].shape[0] == config["vocab_size"]
    return config


def special_ids(config: dict[str, Any]) -> list[int | None]:
    return [config.get(f"{name}_token_id") for name in ("bos", "eos", "pad")]


def test_the_tokenizer_that_the_args_name_is_copied(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With its size and special ids; the tokenizer loads from the result.

    The tied checkpoint becomes a qwen2, for which AutoTokenizer ignores the tokenizer's own class.
    """
    tokenizer = make_tokenizer(tmp_path / "tok", 253)
    edit_args(
        trained / "release",
        llr_vocab_size=253,
        tokenizer_type="HuggingFaceTokenizer",
        tokenizer_model=str(tokenizer),
        vocab_size=None,
    )
    config = export(trained, tmp_path / "out")
    assert config["vocab_size"] == 253
    assert special_ids(config) == [0, 1, 2]
    assert "AutoTokenizer loads 254 tokens from the copy instead of 253" in capsys.readouterr().out
    assert len(PreTrainedTokenizerFast.from_pretrained(tmp_path / "out")) == 253
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (
        tokenizer / "tokenizer.json"
    ).read_bytes()


@pytest.mark.parametrize("model", ["somebody/model", "{}/gone", "{}/other", None])
def test_without_its_folder_the_recorded_size_and_end_remain(
    model: str | None, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder with another number of tokens is not the one that the model was trained with."""
    make_tokenizer(tmp_path / "other", 200)
    edit_args(
        trained / "release",
        llr_vocab_size=253,
        llr_eod_id=7,
        tokenizer_type="HuggingFaceTokenizer",
        tokenizer_model=model and model.format(tmp_path),
    )
    config = export(trained, tmp_path / "out")
    assert config["vocab_size"] == 253
    assert special_ids(config) == [None, 7, None]
    assert "add one with --files DIR" in capsys.readouterr().out
    assert not (tmp_path / "out" / "tokenizer.json").exists()


def test_a_folder_with_only_a_tokenizer_is_accepted(trained: Path, tmp_path: Path) -> None:
    """By both names of the flag. Without a recorded size, the tokenizer's counts."""
    make_tokenizer(tmp_path / "tok", 240, pad_token="</s>")
    edit_args(trained / "release", tokenizer_type="HuggingFaceTokenizer", vocab_size=100)
    for flag in ("--files", "--tokenizer"):
        config = export(trained, tmp_path / flag, flag, tmp_path / "tok")
        assert config["vocab_size"] == 240
        assert special_ids(config) == [0, 1, 1]
        assert (tmp_path / flag / "tokenizer.json").is_file()


def test_the_order_flag_config_recorded_size(
    trained: Path, checkpoint: Path, tmp_path: Path
) -> None:
    """250 rows in the config.json, 230 tokens recorded, 240 chosen: as for a Qwen."""
    make_tokenizer(tmp_path / "tok", 220)
    edit_args(trained / "release", llr_vocab_size=230)
    tokenizer_only = ("--files", tmp_path / "tok")
    whole = ("--files", checkpoint / HUGGING_FACE)
    assert export(trained, tmp_path / "1", *tokenizer_only)["vocab_size"] == 230
    assert export(trained, tmp_path / "2", *whole)["vocab_size"] == 250
    assert export(trained, tmp_path / "3", *whole, "--vocab-size", 240)["vocab_size"] == 240
    assert export(trained, tmp_path / "4", "--vocab-size", 240)["vocab_size"] == 240
    # A tokenizer for a converted model: its config.json is next to the checkpoint.
    shutil.copytree(checkpoint / HUGGING_FACE, trained / HUGGING_FACE)
    assert export(trained, tmp_path / "5", *tokenizer_only)["vocab_size"] == 250
    assert len(PreTrainedTokenizerFast.from_pretrained(tmp_path / "5")) == 220


SIZES = {
    "NullTokenizer": ({"vocab_size": 200}, 200, 199),
    "NullTokenizer with an end": ({"vocab_size": 200, "null_tokenizer_eod_id": 3}, 200, 3),
    "NullTokenizer without an end": ({"vocab_size": 200, "null_tokenizer_eod_id": -1}, 200, None),
    "NullMultimodalTokenizer": ({"vocab_size": 200}, 201, None),
    "TikTokenizer": ({"vocab_size": 200}, 200, None),
    "SentencePieceTokenizer": ({"vocab_size": 200}, 256, None),
    "SentencePieceTokenizer, recorded": ({"llr_vocab_size": 210, "llr_eod_id": 2}, 210, 2),
    "HuggingFaceTokenizer": ({"vocab_size": 200}, 256, None),
    "an end outside": ({"llr_vocab_size": 210, "llr_eod_id": 211}, 210, None),
    "no end": ({"llr_vocab_size": 210, "llr_eod_id": -1}, 210, None),
    "values of other types": ({"llr_vocab_size": "210", "llr_eod_id": 1.0}, 256, None),
}


@pytest.mark.parametrize("case", SIZES)
def test_the_size_at_save_time_by_tokenizer(case: str, trained: Path, tmp_path: Path) -> None:
    """--vocab-size counts only for the tokenizers that take their size from it."""
    args, rows, end = SIZES[case]
    kind = case.split()[0].rstrip(",")
    known = {"tokenizer_type": kind if kind.endswith("Tokenizer") else "SFTTokenizer"}
    edit_args(trained / "release", **{"vocab_size": None, **known, **args})
    config = export(trained, tmp_path / "out")
    assert (config["vocab_size"], config["eos_token_id"]) == (rows, end)


BAD = {
    "neither": ([], "neither config.json nor a tokenizer"),
    "too many tokens": (["--files", "tok"], "has 260 tokens, but the model keeps 256 rows"),
    "too few rows": (["--files", "tok", "--vocab-size", "100"], "keeps 100 rows"),
    "more rows than there are": (["--vocab-size", "300"], "must be 1 to 256"),
    "a damaged tokenizer": (["--files", "damaged"], "cannot load the tokenizer in"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_tokenizer_that_does_not_fit_is_refused(
    case: str, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_tokenizer(tmp_path / "tok", 260)
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "tokenizer.json").write_text('{"version": 1')
    (tmp_path / "empty").mkdir()
    edit_args(trained / "release", vocab_size=None)
    flags, expected = BAD[case]
    flags = [str(tmp_path / flag) if flag in ("tok", "damaged") else flag for flag in flags]
    flags = flags or ["--files", str(tmp_path / "empty")]
    assert cli.main([str(trained), str(tmp_path / "out"), *flags]) == 1
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1
    assert expected in error[0]
    assert not (tmp_path / "out").exists()


def test_generate_text_works_on_an_export(trained: Path, tmp_path: Path) -> None:
    """With a tokenizer and without; errors are one line."""
    make_tokenizer(tmp_path / "tok", 250)
    export(trained, tmp_path / "with", "--files", tmp_path / "tok")
    export(trained, tmp_path / "bytes")
    export(trained, tmp_path / "few", "--vocab-size", 200)
    (tmp_path / "empty").mkdir()
    shutil.copyfile(tmp_path / "few" / "config.json", tmp_path / "empty" / "config.json")
    generate = runpy.run_path(str(ROOT / "examples" / "generate_text.py"))["continuation"]
    assert generate(tmp_path / "with", "def", 3).startswith("def")
    assert generate(tmp_path / "bytes", "def", 3).startswith("def")
    bad = {
        "There is no model in": (tmp_path / "nowhere", "x"),
        "transformers cannot load": (tmp_path / "empty", "x"),
        "has a token 255, but the model has 200": (tmp_path / "few", "\udcff"),
        "has no token": (tmp_path / "bytes", ""),
    }
    for expected, arguments in bad.items():
        with pytest.raises(ValueError, match=f"^megatron_llr: .*{expected}"):
            generate(*arguments, 3)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "examples/generate_text.py", tmp_path / "nowhere", "x"],
        cwd=ROOT, capture_output=True, text=True, timeout=1800, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
