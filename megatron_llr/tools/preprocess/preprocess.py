"""Text files into one dataset for `--data-path`, by several processes, in the files' order."""

import multiprocessing
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_llr.errors import user_error
from megatron_llr.tools.preprocess.pair import PairWriter
from megatron_llr.tools.preprocess.sources import (
    Chunk,
    expand,
    is_json_lines,
    read_chunks,
    total_bytes,
)
from megatron_llr.tools.preprocess.tokenizing import (
    Encoded,
    Tokenizer,
    encode_in_worker,
    start_worker,
)
from megatron_llr.tools.progress import Progress

# Chunks that wait for or at a worker; bounds what is held in memory.
_CHUNKS_PER_WORKER = 4


@dataclass(frozen=True)
class Options:
    """What to turn into tokens, and how.

    Attributes:
        inputs: files or glob patterns, in the order of the dataset.
        output: path of the pair without suffix.
        tokenizer: how text becomes tokens.
        json_key: key of the text in JSON lines.
        form: what the files are, one of `sources.FORMATS`.
        documents: what a document of plain text is, one of `sources.DOCUMENTS`.
        workers: processes that tokenize.
        overwrite: whether an existing pair may be replaced.
    """

    inputs: tuple[str, ...]
    output: str
    tokenizer: Tokenizer
    json_key: str = "text"
    form: str = "auto"
    documents: str = "file"
    workers: int = 1
    overwrite: bool = False


@dataclass(frozen=True)
class Summary:
    """What was written: counts, bytes of the `.bin` file, seconds."""

    documents: int
    empty: int
    tokens: int
    bytes: int
    seconds: float


def preprocess(options: Options) -> Summary:
    """Write the dataset; the pair is the same to the byte for any number of workers.

    Raises:
        ValueError: for input that cannot be read or an output that cannot be written; no pair is
            left then.
        RuntimeError: if the pair does not read back as it was written.
    """
    if options.workers < 1:
        raise user_error("bad --workers", got=options.workers, allowed="from 1", remedy="set it")
    began = time.monotonic()
    paths = expand(options.inputs)
    tokenizer = options.tokenizer
    vocab_size = tokenizer.vocab_size
    if tokenizer.append_eod:
        _ = tokenizer.end_of_document  # an error now, not in a worker
    writer = PairWriter(options.output, vocab_size, overwrite=options.overwrite)
    empty = 0
    with writer, Progress(total_bytes(paths)) as progress:
        for encoded in _encoded(_chunks(paths, options), tokenizer, options.workers):
            writer.add(np.frombuffer(encoded.ids, np.intc), encoded.lengths)
            empty += encoded.empty
            rate = writer.tokens / max(1e-9, time.monotonic() - began)
            progress.advance(encoded.read, f"{writer.tokens:,} tokens, {rate:,.0f} tokens/s")
    size = Path(f"{options.output}.bin").stat().st_size
    return Summary(writer.documents, empty, writer.tokens, size, time.monotonic() - began)


def _chunks(paths: list[str], options: Options) -> Iterator[Chunk]:
    for path in paths:
        key = options.json_key if is_json_lines(path, options.form) else None
        yield from read_chunks(path, json_key=key, documents=options.documents)


def _encoded(chunks: Iterable[Chunk], tokenizer: Tokenizer, workers: int) -> Iterator[Encoded]:
    """Tokens of every chunk, in the order of the chunks."""
    if workers == 1:
        yield from map(tokenizer.encode, chunks)
        return
    # Spawned, not forked: a fork of a process with threads (torch has some) may hang.
    pool = ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=start_worker,
        initargs=(tokenizer.name, tokenizer.append_eod),
    )
    waiting: deque[Future[Encoded]] = deque()
    try:
        for chunk in chunks:
            waiting.append(pool.submit(encode_in_worker, chunk))
            if len(waiting) > _CHUNKS_PER_WORKER * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as broken:
        raise user_error(
            "a worker process was ended from outside",
            got=str(broken),
            allowed="workers that live to the end",
            remedy="if memory ran out, set a smaller --workers",
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)
