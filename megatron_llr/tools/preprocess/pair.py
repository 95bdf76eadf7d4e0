"""Megatron's `.bin` and `.idx` pair, written whole or not at all, and read back."""

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

from megatron_llr.errors import user_error

_READ_BYTES = 1 << 24


class PairWriter:
    """Write documents beside their place; `with` ends in a whole, checked pair, or in none.

    A pair in its place is whole at every moment, also if this process is killed: the old index goes
    first, the new one comes last, and Megatron reads nothing without an index.

    Args:
        prefix: path of the pair without suffix, as for Megatron's `--data-path`.
        vocab_size: number of token ids; up to 65499 fit two bytes a token, as Megatron decides.
        overwrite: whether a pair that is there may be replaced.

    Attributes:
        documents: written so far.
        tokens: written so far, ends of documents included.

    Raises:
        ValueError: if the prefix is a folder's, there is a pair already, or the files cannot be
            written.
    """

    def __init__(
        self, prefix: str | os.PathLike[str], vocab_size: int, *, overwrite: bool = False
    ) -> None:
        # `Path` drops a slash at the end: the pair would lie beside the folder.
        if os.path.basename(prefix) in ("", ".", ".."):
            raise user_error(
                "the output has no name",
                got=os.fspath(prefix) or "nothing",
                allowed="the path of the pair without suffix, such as data/corpus",
                remedy="add a name to --output",
            )
        self._target = Path(prefix)
        self._vocab_size = vocab_size
        self.documents = 0
        self.tokens = 0
        self._checksum = 0
        self._builder: Any = None
        there = [path for path in self._paths(self._target) if path.exists()]
        if there and not overwrite:
            raise user_error(
                "the output is there already",
                got=", ".join(map(str, there)),
                allowed="a new path",
                remedy="give another --output, or set --overwrite",
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

    def add(self, ids: npt.NDArray[Any], lengths: Sequence[int]) -> None:
        """Append documents.

        Args:
            ids: token ids of all of them, one after the other; any integer dtype.
            lengths: tokens of each.

        Raises:
            ValueError: if the files cannot be written, or an id is beyond the vocabulary.
        """
        assert len(ids) == sum(lengths)
        if len(ids):
            assert int(ids.min()) >= 0, "token ids start at 0"
            if (highest := int(ids.max())) >= self._vocab_size:
                raise user_error(
                    "a token id beyond the vocabulary",
                    got=highest,
                    allowed=f"0 to {self._vocab_size - 1}, as many as the vocabulary has entries",
                    remedy="take another --tokenizer, or number this one's tokens without gaps",
                )
        stored = ids.astype(self.dtype)
        start = 0
        try:
            for length in lengths:
                self._builder.add_document(stored[start : start + length], [length])
                start += length
        except OSError as broken:
            raise self._cannot_write(broken) from broken
        self._checksum = zlib.crc32(stored.tobytes(), self._checksum)
        self.documents += len(lengths)
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
            self._close()
            for path in parts:
                path.unlink(missing_ok=True)

    def _close(self) -> None:
        """Close the data file, which after a full disk cannot be flushed."""
        with contextlib.suppress(OSError):
            self._builder.data_file.close()

    def _finish(self, parts: list[Path]) -> None:
        if self.documents == 0:
            raise user_error(
                f"no text to write to {self._target}",
                got="empty documents alone",
                allowed="at least one with text",
                remedy="look at the input files, and at --json-key",
            )
        self._builder.finalize(str(parts[1]))
        for path in parts:
            _to_disk(path)
        self._read_back(parts)
        data, index = self._paths(self._target)
        index.unlink(missing_ok=True)
        os.replace(parts[0], data)
        os.replace(parts[1], index)

    def _read_back(self, parts: list[Path]) -> None:
        """Compare the files with what was to be written, through Megatron's own reader.

        Reads every byte once: cheap beside tokenizing.

        Raises:
            RuntimeError: if they differ, which a failing disk alone explains.
        """
        dataset = IndexedDataset(str(self._part))
        checksum = 0
        with parts[0].open("rb") as file:
            while block := file.read(_READ_BYTES):
                checksum = zlib.crc32(block, checksum)
        found = (
            len(dataset.document_indices) - 1,
            int(dataset.sequence_lengths.sum(dtype=np.int64)),
            parts[0].stat().st_size,
            checksum,
        )
        size = self.tokens * self.dtype.itemsize
        expected = (self.documents, self.tokens, size, self._checksum)
        if found != expected:
            raise RuntimeError(
                f"megatron_llr: {self._target} reads back as (documents, tokens, bytes, checksum) "
                f"{found} where {expected} was written; nothing is left; check the disk"
            )

    def _cannot_write(self, broken: OSError) -> ValueError:
        return user_error(
            f"cannot write {self._target}",
            got=broken.strerror or str(broken),
            allowed="a folder that can be written, with room for the tokens",
            remedy="free some space or give another --output; nothing half-written is left",
        )


def _to_disk(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
