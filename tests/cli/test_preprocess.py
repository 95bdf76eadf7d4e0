"""tools/preprocess_data.py: its output, the input it refuses, and that no partial file is left."""

import gzip
from pathlib import Path

import numpy as np
import pytest

from tests.cli.preprocessing import (
    ROOT,
    assert_nothing_left,
    preprocess,
    write_jsonl,
)

TEXTS = [f"document {number}: " + "grüße, 世界 " * (number % 7) for number in range(300)]


def read(prefix: Path) -> tuple[np.dtype, list[list[int]]]:
    """The dataset, read by its format only: dtype of the tokens, and every document."""
    raw = Path(f"{prefix}.idx").read_bytes()
    assert raw[:9] == b"MMIDIDX\0\0"
    assert int.from_bytes(raw[9:17], "little") == 1
    dtype = np.dtype({8: np.uint16, 4: np.int32}[raw[17]])
    sequences, ends = (int.from_bytes(raw[at : at + 8], "little") for at in (18, 26))
    lengths = np.frombuffer(raw, np.int32, sequences, 34)
    documents = np.frombuffer(raw, np.int64, ends, 34 + sequences * 12)
    assert documents.tolist() == list(range(sequences + 1))
    tokens = np.fromfile(f"{prefix}.bin", dtype)
    assert len(tokens) == lengths.sum()
    return dtype, [part.tolist() for part in np.split(tokens, np.cumsum(lengths)[:-1])]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of 500 pairs, trained here."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator(TEXTS, trainer)
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>").save_pretrained(folder)
    return folder


def test_bytes_from_many_files_in_their_order(tmp_path: Path) -> None:
    """JSON lines, gzip, a glob and plain text; the demo's tokenizer flags read it."""
    write_jsonl(tmp_path / "b.jsonl", ["second", ""])
    write_jsonl(tmp_path / "a.jsonl", ["first"])
    with gzip.open(tmp_path / "c.txt.gz", "wb") as file:
        file.write(b"one\nmore\n\n\nthird \xff\n")
    done = preprocess(
        tmp_path / "*.jsonl", tmp_path / "c.txt.gz", "--documents", "paragraph", "--output",
        tmp_path / "out" / "set",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "4 documents (1 empty documents skipped)" in done.stdout
    assert "--tokenizer-type NullTokenizer --vocab-size 257" in done.stdout
    dtype, documents = read(tmp_path / "out" / "set")
    assert dtype == np.uint16
    assert documents == [
        [*text, 256] for text in (b"first", b"second", b"one\nmore\n", b"third \xff\n")
    ]
    assert_nothing_left(tmp_path / "out", "set.bin", "set.idx")


def test_few_documents_are_warned_about_with_a_split_that_works(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("one\nmore\n")
    one = preprocess(tmp_path / "one.txt", "--output", tmp_path / "one")
    assert f"--data-path {tmp_path / 'one'} " in one.stdout
    assert one.stdout.endswith(" --split 100,0,0 --eval-iters 0\n")
    assert "The dataset has one document, which cannot be split" in one.stderr
    assert "set --documents paragraph or line" in one.stderr
    two = preprocess(
        tmp_path / "one.txt", "--documents", "line", "--output", tmp_path / "two"
    )  # fmt: skip
    assert two.stdout.endswith(" --split 1,1,0\n")
    assert "The dataset has 2 documents, too few for Megatron's default --split" in two.stderr
    write_jsonl(tmp_path / "many.jsonl", TEXTS * 2)
    many = preprocess(tmp_path / "many.jsonl", "--output", tmp_path / "many")
    assert "--split" not in many.stdout
    assert many.stderr == "" or "warning" not in many.stderr


def test_any_number_of_workers_writes_the_same_bytes(tmp_path: Path, tokenizer: Path) -> None:
    """And the tokens are those of the tokenizer."""
    from transformers import AutoTokenizer

    # More than one chunk.
    texts = [*TEXTS, "x" * 700_000, "y" * 700_000, *TEXTS]
    source = write_jsonl(tmp_path / "text.jsonl", texts, "content")
    for workers in (1, 3):
        done = preprocess(
            source, "--output", tmp_path / f"set{workers}", "--tokenizer", tokenizer,
            "--json-key", "content", "--workers", workers,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert f"--tokenizer-type HuggingFaceTokenizer --tokenizer-model {tokenizer}" in done.stdout
    for suffix in ("bin", "idx"):
        one, three = ((tmp_path / f"set{n}.{suffix}").read_bytes() for n in (1, 3))
        assert one == three
    loaded = AutoTokenizer.from_pretrained(tokenizer)
    dtype, documents = read(tmp_path / "set3")
    assert dtype == np.uint16
    assert len(documents) == len(texts)
    for text, ids in zip(TEXTS, documents, strict=False):
        assert ids == [*loaded(text).input_ids, loaded.eos_token_id]
        assert loaded.decode(ids[:-1]) == text


def line_7_is_broken(folder: Path) -> list[object]:
    source = write_jsonl(folder / "in.jsonl", TEXTS[:6])
    source.write_text(source.read_text() + '{"text": "no end\n')
    return [source]


def no_such_key(folder: Path) -> list[object]:
    return [write_jsonl(folder / "in.jsonl", ["x"]), "--json-key", "body"]


def not_a_string(folder: Path) -> list[object]:
    (folder / "in.jsonl").write_text('{"text": 3}\n')
    return [folder / "in.jsonl"]


def not_gzip(folder: Path) -> list[object]:
    (folder / "in.gz").write_text("plain")
    return [folder / "in.gz"]


def ids_with_a_gap(folder: Path) -> list[object]:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.WordLevel({"low": 0, "</s>": 1, "high": 7}, unk_token="low"))
    PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>").save_pretrained(folder / "t")
    return [write_jsonl(folder / "in.jsonl", ["low", "high"]), "--tokenizer", folder / "t"]


def not_utf8(folder: Path) -> list[object]:
    (folder / "in.txt").write_bytes(b"good\nb\xffd\n")
    return [folder / "in.txt", "--tokenizer", "TOKENIZER"]


REFUSED = {
    "malformed line": (
        line_7_is_broken,
        ["in.jsonl:7 is not JSON", "must be one JSON object", "set --format text"],
    ),
    "missing key": (
        no_such_key,
        [
            "in.jsonl:1 has no text with the key 'body': it has the keys 'id', 'text'",
            'must be like {"body": "..."}',
            "Set --json-key",
        ],
    ),
    "not a string": (
        not_a_string,
        [
            "in.jsonl:1 has no text with the key 'text': it has a number there",
            'must be like {"text": "..."}',
            "Set --json-key",
        ],
    ),
    "not gzip": (not_gzip, ["Cannot read", "in.gz", "must be a readable gzip file"]),
    "ids with a gap": (
        ids_with_a_gap,
        ["token id 7 is outside the vocabulary", "must be 0 to 2", "another --tokenizer"],
    ),
    "not UTF-8": (
        not_utf8,
        ["in.txt:2 is not UTF-8: it has the byte 0xff", "must be UTF-8 text", "omit --tokenizer"],
    ),
    "no file": (
        lambda folder: [folder / "none.txt"],
        ["none.txt: no such file", "must be a file, a pipe, or a pattern", "Correct the path"],
    ),
    "no match": (
        lambda folder: [folder / "*.txt"],
        ["*.txt: no such file", "must be a file, a pipe, or a pattern", "Correct the path"],
    ),
    "only empty": (
        lambda folder: [write_jsonl(folder / "in.jsonl", [""])],
        ["no text to write", "At least one must have text", "--json-key"],
    ),
    "no tokenizer": (
        lambda folder: [write_jsonl(folder / "i.jsonl", ["x"]), "--tokenizer", "./none"],
        ["Cannot load --tokenizer ./none: no such folder", "must be a folder with tokenizer files"],
    ),
    "no tokenizer on the Hub": (
        lambda folder: [write_jsonl(folder / "i.jsonl", ["x"]), "--tokenizer", "nobody/nothing"],
        ["Cannot load --tokenizer nobody/nothing", "name on the Hugging Face Hub"],
    ),
    "no workers": (
        lambda folder: [write_jsonl(folder / "i.jsonl", ["x"]), "--workers", "0"],
        ["--workers is 0", "must be at least 1"],
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_one_line_and_leaves_nothing(
    case: str, tmp_path: Path, tokenizer: Path
) -> None:
    make, parts = REFUSED[case]
    (tmp_path / "out").mkdir()
    arguments = [tokenizer if given == "TOKENIZER" else given for given in make(tmp_path)]
    done = preprocess(*arguments, "--output", tmp_path / "out" / "set")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    for part in parts:
        assert part in line
    assert_nothing_left(tmp_path / "out")


@pytest.mark.parametrize("name", ["", "."])
def test_a_folder_as_output_is_refused(name: str, tmp_path: Path) -> None:
    """Also if the input is malformed, because the output is checked first."""
    source = line_7_is_broken(tmp_path)[0]
    (tmp_path / "out").mkdir()
    done = preprocess(source, "--output", f"{tmp_path}/out/{name}")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert f"The output {tmp_path}/out/{name} has no file name. It must be the path" in line
    assert "such as data/corpus. Add a name to --output" in line
    assert_nothing_left(tmp_path, "in.jsonl", "out")
    assert_nothing_left(tmp_path / "out")


def test_an_error_in_a_worker_is_reported_the_same_way(tmp_path: Path) -> None:
    done = preprocess(*line_7_is_broken(tmp_path), "--output", tmp_path / "s", "--workers", 2)
    assert done.returncode == 1
    assert "in.jsonl:7 is not JSON" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert_nothing_left(tmp_path, "in.jsonl")


def test_an_existing_dataset_is_kept_without_overwrite(tmp_path: Path) -> None:
    old, new = (write_jsonl(tmp_path / f"{name}.jsonl", [name]) for name in ("old", "new"))
    prefix = tmp_path / "set"
    assert preprocess(old, "--output", prefix).returncode == 0
    done = preprocess(new, "--output", prefix)
    assert done.returncode == 1
    assert "The output already exists: " in done.stderr
    assert "--overwrite" in done.stderr
    # A failure with --overwrite keeps the old dataset.
    failed = preprocess(*no_such_key(tmp_path), "--overwrite", "--output", prefix)
    assert failed.returncode == 1
    assert read(prefix)[1] == [[*b"old", 256]]
    done = preprocess(new, "--output", prefix, "--overwrite", "--no-append-eod")
    assert done.returncode == 0
    assert read(prefix)[1] == [[*b"new"]]


def test_a_full_disk(tmp_path: Path) -> None:
    """The data file is a link to a device that is always full."""
    source = write_jsonl(tmp_path / "in.jsonl", ["x" * 100_000])
    (tmp_path / "set.part.bin").symlink_to("/dev/full")
    done = preprocess(source, "--output", tmp_path / "set")
    assert done.returncode == 1
    assert "set: No space left on device" in done.stderr
    assert_nothing_left(tmp_path, "in.jsonl")


def test_help_fits_one_screen() -> None:
    done = preprocess("--help")
    lines = done.stdout.splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 100
    assert "example:" in lines


def test_the_tool_holds_no_logic() -> None:
    assert len((ROOT / "tools" / "preprocess_data.py").read_text().splitlines()) <= 30
