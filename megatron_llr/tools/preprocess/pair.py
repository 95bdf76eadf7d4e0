"""Megatron's `.bin` and `.idx` files, written completely or not at all, and verified."""

import contextlib
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

from megatron_llr.errors import input_error

_READ_BYTES = 1 << 24

# Megatron's index stores the length of a document as a signed 32-bit integer.
LONGEST_DOCUMENT = 2**31 - 1


class PairWriter:
    """Writes documents to temporary files; leaving the `with` block verifies and renames them.

    If the block fails, the temporary files are removed. An existing dataset is never inconsistent,
    even if this process is killed: the old index is removed first, and the new one is renamed last.
    Megatron reads nothing without an index.

    Args:
        prefix: path of the dataset without suffix, as for Megatron's `--data-path`.
        vocab_size: number of token ids; below 65500 Megatron stores two bytes per token.
        overwrite: whether an existing dataset may be replaced.

    Attributes:
        documents: number written so far.
        tokens: number written so far, including end-of-document tokens.

    Raises:
        ValueError: if the prefix is a folder, the dataset exists, or the files cannot be written.
    """

    def __init__(
        self, prefix: str | os.PathLike[str], vocab_size: int, *, overwrite: bool = False
    ) -> None:
        # `Path` drops a trailing slash: the files would be written next to the folder.
        if os.path.basename(prefix) in ("", ".", ".."):
            raise input_error(
                f"The output {os.fspath(prefix) or repr('')} has no file name. It must be the path "
                "of the dataset without suffix, such as data/corpus. Add a name to --output."
            )
        self._target = Path(prefix)
        self._vocab_size = vocab_size
        self.documents = 0
        self.tokens = 0
        self._open_tokens = 0
        self._checksum = 0
        self._builder: Any = None
        existing = [path for path in self._paths(self._target) if path.exists()]
        if existing and not overwrite:
            raise input_error(
                f"The output already exists: {', '.join(map(str, existing))}. It must be a new "
                "path. Choose another --output, or set --overwrite."
            )
        self._part = self._target.with_name(self._target.name + ".part")
        self.dtype = np.dtype(DType.optimal_dtype(vocab_size))

    @staticmethod
    def _paths(prefix: Path) -> list[Path]:
        return [Path(f"{prefix}.{suffix}") for suffix in ("bin", "idx")]

    def __enter__(self) -> "PairWriter":
        try:
            self._target.parent.mkdir(parents=True, exist_ok=True)
            self._builder = IndexedDatasetBuilder(
                str(self._paths(self._part)[0]), dtype=self.dtype.type
            )
        except OSError as broken:
            raise self._cannot_write(broken) from broken
        return self

    def add(
        self,
        ids: npt.NDArray[Any],
        lengths: Sequence[int],
        *,
        continues: bool = False,
        place: str | None = None,
    ) -> None:
        """Append documents.

        Args:
            ids: concatenated token ids of all documents, of any integer dtype.
            lengths: number of tokens of each document.
            continues: whether the last document continues in the next call.
            place: where the documents come from, for errors.

        Raises:
            ValueError: if the files cannot be written, an id is outside the vocabulary, or a
                document is longer than LONGEST_DOCUMENT.
        """
        assert len(ids) == sum(lengths)
        if len(ids):
            assert int(ids.min()) >= 0, "token ids start at 0"
            if (highest := int(ids.max())) >= self._vocab_size:
                raise input_error(
                    f"The token id {highest} is outside the vocabulary of {self._vocab_size} "
                    f"entries. It must be 0 to {self._vocab_size - 1}. Choose another --tokenizer, "
                    "or number the tokens of this one without gaps."
                )
        stored = ids.astype(self.dtype)
        try:
            self._builder.data_file.write(stored)
            for position, length in enumerate(lengths, start=1):
                self._open_tokens += length
                if self._open_tokens > LONGEST_DOCUMENT:
                    raise too_long(
                        f"A document at {place}" if place else f"Document {self.documents + 1}"
                    )
                if position == len(lengths) and continues:
                    break
                # The tokens are already written.
                self._builder.add_document(stored[:0], [self._open_tokens])
                self.documents += 1
                self._open_tokens = 0
        except OSError as broken:
            raise self._cannot_write(broken) from broken
        self._checksum = zlib.crc32(stored, self._checksum)
        self.tokens += len(ids)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        parts = self._paths(self._part)
        try:
            if kind is None:
                self._finish(parts)
        except OSError as broken:
            raise self._cannot_write(broken) from broken
        finally:
            # The data file cannot be flushed if the disk is full.
            with contextlib.suppress(OSError):
                self._builder.data_file.close()
            for path in parts:
                path.unlink(missing_ok=True)

    def _finish(self, parts: list[Path]) -> None:
        if self.documents == 0:
            raise input_error(
                f"There is no text to write to {self._target}: all documents are empty. At least "
                "one must have text. Check the input files and --json-key."
            )
        self._builder.finalize(str(parts[1]))
        for path in parts:
            with path.open("rb") as file:
                os.fsync(file.fileno())
        self._read_back(parts)
        data, index = self._paths(self._target)
        try:
            index.unlink(missing_ok=True)
            os.replace(parts[0], data)
            os.replace(parts[1], index)
        except BaseException:  # a signal, too
            if not index.exists():
                data.unlink(missing_ok=True)
            raise

    def _read_back(self, parts: list[Path]) -> None:
        """Compare the files with the added documents, using Megatron's reader.

        It reads every byte once, which is cheap compared with tokenizing.

        Raises:
            RuntimeError: if they differ, which only a failing disk explains.
        """
        dataset = IndexedDataset(str(self._part))
        checksum = 0
        with parts[0].open("rb") as file:
            while block := file.read(_READ_BYTES):
                checksum = zlib.crc32(block, checksum)
        written = (
            len(dataset.document_indices) - 1,
            int(dataset.sequence_lengths.sum(dtype=np.int64)),
            parts[0].stat().st_size,
            checksum,
        )
        size = self.tokens * self.dtype.itemsize
        expected = (self.documents, self.tokens, size, self._checksum)
        if written != expected:
            raise RuntimeError(
                f"megatron_llr: {self._target} has (documents, tokens, bytes, checksum) {written} "
                f"when read back. It must have {expected}. The files were removed. Check the disk."
            )

    def _cannot_write(self, broken: OSError) -> ValueError:
        return input_error(
            f"Cannot write {self._target}: {broken.strerror or broken}. It must be in a writable "
            "folder with space for the tokens. Free some space or choose another --output. The "
            "partial output was removed."
        )


def too_long(document: str) -> ValueError:
    """The error for a document with more than LONGEST_DOCUMENT tokens."""
    return input_error(
        f"{document} has more than {LONGEST_DOCUMENT:,} tokens. Megatron's index cannot store the "
        "length of a longer document. Divide it, or set --documents paragraph or line."
    )
