"""Converts text files to one dataset for `--data-path`, in order, with several processes."""

import itertools
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, replace
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
from megatron_llr.tools.preprocess.tokenizing import Encoded, Tokenizer
from megatron_llr.tools.preprocess.workers import WorkerPool
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


def _encoded(chunks: Iterable[Chunk], tokenizer: Tokenizer, workers: int) -> Iterator[Encoded]:
    """Tokens of every chunk, in order."""
    if workers == 1:
        yield from map(tokenizer.encode, chunks)
        return
    waiting: deque[Future[Encoded]] = deque()
    # A copy without the loaded tokenizer: every process loads its own.
    with WorkerPool(workers, replace(tokenizer).encode) as pool:
        for chunk in chunks:
            waiting.append(pool.submit(chunk))
            if len(waiting) > _CHUNKS_PER_WORKER * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
