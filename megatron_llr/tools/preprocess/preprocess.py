"""Converts text files to one dataset for `--data-path`, in order, with several processes."""

import contextlib
import itertools
import multiprocessing
import signal
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import resource_tracker
from pathlib import Path

import numpy as np

from megatron_llr.errors import input_error
from megatron_llr.tools.preprocess.pair import LONGEST_DOCUMENT, PairWriter, too_long
from megatron_llr.tools.preprocess.pieces import check_cut
from megatron_llr.tools.preprocess.sources import (
    Chunk,
    TextFormat,
    expand,
    read_chunks,
)
from megatron_llr.tools.preprocess.tokenizing import (
    Encoded,
    Tokenizer,
    encode_in_worker,
    start_worker,
)
from megatron_llr.tools.progress import Progress

# Chunks submitted to the workers; bounds memory use.
_CHUNKS_PER_WORKER = 4


@dataclass(frozen=True)
class Options:
    """Inputs, output and settings.

    Attributes:
        inputs: files or glob patterns, in the order of the dataset.
        output: path of the dataset without suffix.
        tokenizer: the tokenizer.
        text_format: how the inputs are read.
        workers: number of tokenizing processes.
        overwrite: whether an existing dataset may be replaced.
    """

    inputs: tuple[str, ...]
    output: str
    tokenizer: Tokenizer
    text_format: TextFormat
    workers: int = 1
    overwrite: bool = False


@dataclass(frozen=True)
class Summary:
    """Counts, bytes of the `.bin` file, and seconds."""

    documents: int
    empty: int
    tokens: int
    bytes: int
    seconds: float


def preprocess(options: Options) -> Summary:
    """Write the dataset. Its bytes do not depend on the number of workers.

    Raises:
        ValueError: if an input cannot be read or the output cannot be written; no output is left.
        RuntimeError: if the written files differ when read back.
    """
    if options.workers < 1:
        raise input_error(f"--workers is {options.workers}. It must be at least 1.")
    began = time.monotonic()
    sources = expand(options.inputs, options.text_format)
    tokenizer = options.tokenizer
    tokenizer.check_end_of_document()
    if tokenizer.name is None:
        for source in sources:
            if source.one_document and source.size + tokenizer.append_eod > LONGEST_DOCUMENT:
                raise too_long(source.path)
    writer = PairWriter(options.output, tokenizer.vocab_size, overwrite=options.overwrite)
    chunks = itertools.chain.from_iterable(
        read_chunks(source.path, options.text_format, in_pieces=tokenizer.takes_pieces)
        for source in sources
    )
    sizes = [source.size for source in sources]
    empty = 0
    right: tuple[int, ...] = ()
    with writer, Progress(sum(sizes) if all(sizes) else 0) as progress:
        for encoded in _encoded(chunks, tokenizer, options.workers):
            check_cut(right, encoded.left, encoded.place)
            right = encoded.right
            ids = np.frombuffer(encoded.ids, np.intc)
            writer.add(ids, encoded.lengths, continues=encoded.continues, place=encoded.place)
            empty += encoded.empty
            rate = writer.tokens / max(1e-9, time.monotonic() - began)
            progress.advance(encoded.read, f"{writer.tokens:,} tokens, {rate:,.0f} tokens/s")
    size = Path(f"{options.output}.bin").stat().st_size
    return Summary(writer.documents, empty, writer.tokens, size, time.monotonic() - began)


@contextlib.contextmanager
def _terminal_signals_blocked() -> Iterator[None]:
    """Processes started in here inherit the mask.

    A terminal signals all processes; only the main process should handle that.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _encoded(chunks: Iterable[Chunk], tokenizer: Tokenizer, workers: int) -> Iterator[Encoded]:
    """Tokens of every chunk, in order."""
    if workers == 1:
        yield from map(tokenizer.encode, chunks)
        return
    with _terminal_signals_blocked():
        resource_tracker.ensure_running()
    # Spawned, not forked: forking a process with threads, such as torch's, can deadlock.
    pool = ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=start_worker,
        initargs=(tokenizer.name, tokenizer.append_eod),
    )
    waiting: deque[Future[Encoded]] = deque()
    try:
        for chunk in chunks:
            with _terminal_signals_blocked():
                waiting.append(pool.submit(encode_in_worker, chunk))
            if len(waiting) > _CHUNKS_PER_WORKER * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as broken:
        raise input_error(
            f"A worker process was killed: {broken} Workers must run to the end. If memory ran "
            "out, set a smaller --workers."
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)
