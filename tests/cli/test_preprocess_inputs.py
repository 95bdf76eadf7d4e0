"""tools/preprocess_data.py with pipes, with names that say nothing, and with long documents."""

import contextlib
import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest

from tests.cli.preprocessing import (
    ENVIRONMENT,
    ROOT,
    TOOL,
    assert_nothing_left,
    forked,
    peak_memory,
    preprocess,
    write_jsonl,
)

TEXTS = [f"document {number}" for number in range(40_000)]


def test_standard_input_and_named_pipes_give_the_bytes_of_the_file(tmp_path: Path) -> None:
    """They are read once, in blocks of any size."""
    source = write_jsonl(tmp_path / "in.jsonl", TEXTS)
    os.mkfifo(tmp_path / "fifo")

    def write() -> None:
        with (tmp_path / "fifo").open("wb") as fifo:
            fifo.write(source.read_bytes()[:7])
            fifo.flush()
            time.sleep(0.05)
            fifo.write(source.read_bytes()[7:])

    assert preprocess(source, "--output", tmp_path / "file").returncode == 0
    writer = threading.Thread(target=write)
    writer.start()
    done = preprocess(tmp_path / "fifo", "--output", tmp_path / "fifo_set", "--workers", 2)
    writer.join()
    assert done.returncode == 0, done.stderr
    gz = subprocess.run(["gzip", "-c", source], capture_output=True, check=True).stdout
    done = preprocess("/dev/stdin", "--output", tmp_path / "stdin_set", stdin=gz)
    assert done.returncode == 0, done.stderr
    for suffix in ("bin", "idx"):
        expected = (tmp_path / f"file.{suffix}").read_bytes()
        assert (tmp_path / f"fifo_set.{suffix}").read_bytes() == expected
        assert (tmp_path / f"stdin_set.{suffix}").read_bytes() == expected


def test_a_pipe_that_is_not_text_is_refused(tmp_path: Path) -> None:
    done = preprocess("/dev/stdin", "--output", tmp_path / "set", stdin=b"PAR1\x15\0")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "/dev/stdin is not text: its first bytes are those of Parquet" in line
    assert_nothing_left(tmp_path)


def test_what_is_neither_file_nor_pipe_is_named(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    done = preprocess(tmp_path / "folder", "--output", tmp_path / "set")
    assert done.returncode == 1
    assert "folder: it is a folder. FILE must be a file, a pipe, or a pattern" in done.stderr
    assert_nothing_left(tmp_path, "folder")


def test_a_signal_while_it_waits_for_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    tool = subprocess.Popen(
        [*TOOL, str(tmp_path / "fifo"), "--output", str(tmp_path / "set")],
        cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while not (tmp_path / "set.part.bin").exists() and tool.poll() is None:
        time.sleep(0.01)
    tool.send_signal(signal.SIGTERM)
    _, errors = tool.communicate(timeout=1800)
    assert (tool.returncode, "Traceback" in errors) == (143, False)
    assert_nothing_left(tmp_path, "fifo")


def test_a_signal_between_the_renames_leaves_no_half_of_a_dataset(tmp_path: Path) -> None:
    """The process signals itself at each step of replacing an existing dataset."""
    program = (
        "import os, signal, sys\n"
        "from megatron_llr.tools.entry_point import run_tool\n"
        "from megatron_llr.tools.preprocess import cli\n"
        "replace, step = os.replace, int(sys.argv.pop(1))\n"
        "def interrupted(*paths):\n"
        "    global step\n"
        "    step -= 1\n"
        "    if step == 0:\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "    replace(*paths)\n"
        "os.replace = interrupted\n"
        "sys.exit(run_tool(lambda: cli.main(sys.argv[1:])))\n"
    )
    source = write_jsonl(tmp_path / "in.jsonl", ["new"])
    for step in (1, 2):
        assert preprocess(source, "--output", tmp_path / "set", "--overwrite").returncode == 0
        arguments = [str(source), "--output", str(tmp_path / "set"), "--overwrite"]
        done = forked("-c", program, step, *arguments)
        assert done.returncode == 143, done.stderr
        assert_nothing_left(tmp_path, "in.jsonl")


@pytest.mark.parametrize("documents", ["file", "paragraph", "line"])
def test_memory_does_not_grow_with_the_length_of_a_document(documents: str, tmp_path: Path) -> None:
    line = "a line of text\n" if documents == "paragraph" else "one line without an end "
    if documents == "file":
        line = "text\n\n"
    peaks = []
    for size in (1, 100):
        source = tmp_path / f"{size}.txt"
        source.write_text(line * (size * 1_000_000 // len(line)))
        output = tmp_path / f"set{size}"
        peaks.append(peak_memory(source, "--output", output, "--documents", documents))
    assert peaks[1] - peaks[0] < 60e6


def test_memory_of_a_tokenizer_does_not_grow_with_the_length_of_a_document(tmp_path: Path) -> None:
    """Also for JSON lines, apart from the text itself and its tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE({token: number for number, token in enumerate(alphabet)}, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=alphabet[0])
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    peaks = []
    for size in (2_000_000, 5_000_000):
        text = "a line of text\n" * (size // 15)
        (tmp_path / "in.txt").write_text(text)
        for source in (tmp_path / "in.txt", write_jsonl(tmp_path / "in.jsonl", [text])):
            flags = ("--tokenizer", tmp_path / "tokenizer", "--overwrite")
            peaks.append(peak_memory(source, "--output", tmp_path / "set", *flags))
    # Tokenized as a whole, the second text would take about 400 MB more than the first.
    assert peaks[2] - peaks[0] < 60e6
    assert peaks[3] - peaks[1] < 250e6


def test_a_file_that_is_too_long_for_one_document_is_refused_before_it_is_read(
    tmp_path: Path,
) -> None:
    """A file with a hole, whose blocks take no space."""
    source = tmp_path / "in.txt"
    source.write_text("text\n" * 2000)
    os.truncate(source, 2**31 - 1)
    done = preprocess(source, "--output", tmp_path / "set")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "in.txt has more than 2,147,483,647 tokens" in line
    assert "Divide it, or set --documents paragraph or line" in line
    assert_nothing_left(tmp_path, "in.txt")


def test_a_document_from_a_pipe_is_refused_when_it_becomes_too_long(tmp_path: Path) -> None:
    """An endless pipe, and a limit that is lower than Megatron's."""
    program = (
        "import sys\n"
        "from megatron_llr.tools.preprocess import cli\n"
        "cli._import_megatron()\n"
        "from megatron_llr.tools.preprocess import pair\n"
        "pair.LONGEST_DOCUMENT = 10_000_000\n"
        "sys.exit(cli.main(sys.argv[1:]))\n"
    )
    with subprocess.Popen(["yes"], stdout=subprocess.PIPE) as yes:
        assert yes.stdout is not None
        done = forked(
            "-c", program, "/dev/stdin", "--output", tmp_path / "set", stdin=yes.stdout
        )  # fmt: skip
        with contextlib.suppress(ProcessLookupError):
            yes.kill()
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "A document at /dev/stdin:" in line
    assert "has more than 10,000,000 tokens" in line
    assert_nothing_left(tmp_path)
