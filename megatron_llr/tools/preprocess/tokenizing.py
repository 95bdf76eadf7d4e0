"""Text to token ids: byte level, or any tokenizer of `transformers`. Imported by every worker."""

import os
import shlex
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from megatron_llr.errors import input_error
from megatron_llr.tools.preprocess.byte_level import END_OF_DOCUMENT, VOCAB_SIZE
from megatron_llr.tools.preprocess.sources import Chunk


@dataclass(frozen=True)
class Encoded:
    """Tokens of a chunk.

    Attributes:
        ids: concatenated ids of all documents.
        lengths: tokens per document, including its end token; without empty documents.
        empty: number of empty documents, which are skipped.
        read: as in the chunk.
    """

    ids: "array[int]"
    lengths: list[int]
    empty: int
    read: int


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer, loaded on first use.

    Attributes:
        name: folder or Hub name of a `transformers` tokenizer; None for byte level.
        append_eod: whether every document ends with the end-of-document token.
    """

    name: str | None
    append_eod: bool

    @cached_property
    def _loaded(self) -> Any:
        return _load(str(self.name))

    @property
    def vocab_size(self) -> int:
        """Number of ids, including added tokens."""
        return VOCAB_SIZE if self.name is None else len(self._loaded)

    @cached_property
    def end_of_document(self) -> int:
        """The end-of-document id, chosen as Megatron does for a `transformers` tokenizer.

        Raises:
            ValueError: if the tokenizer has none.
        """
        if self.name is None:
            return END_OF_DOCUMENT
        ids = (self._loaded.eos_token_id, self._loaded.sep_token_id)
        eod = next((token for token in ids if token is not None), None)
        if eod is None:
            raise input_error(
                f"The tokenizer {self.name} has no end-of-document token. It must have an "
                "eos_token or a sep_token. Set --no-append-eod, or choose another --tokenizer."
            )
        return int(eod)

    @property
    def training_flags(self) -> str:
        """Megatron's flags for this tokenizer, quoted for a shell."""
        if self.name is None:
            return f"--tokenizer-type NullTokenizer --vocab-size {VOCAB_SIZE}"
        return f"--tokenizer-type HuggingFaceTokenizer --tokenizer-model {shlex.quote(self.name)}"

    def encode(self, chunk: Chunk) -> Encoded:
        """Tokens of every document of a chunk, including the tokenizer's special tokens.

        Raises:
            ValueError: with file and line of a document that is not text.
        """
        texts = [text for text in chunk.texts() if text]
        if self.name is None:
            documents: Sequence[Sequence[int]] = texts
        else:
            documents = self._encode_text(chunk, texts)
        ids, lengths = array("i"), []
        for document in documents:
            before = len(ids)
            ids.extend(document)
            # Some tokenizers append the token themselves.
            if self.append_eod and (len(ids) == before or ids[-1] != self.end_of_document):
                ids.append(self.end_of_document)
            if len(ids) > before:
                lengths.append(len(ids) - before)
        return Encoded(ids, lengths, len(chunk.documents) - len(lengths), chunk.read)

    def _encode_text(self, chunk: Chunk, texts: list[bytes]) -> list[list[int]]:
        try:
            decoded = [text.decode() for text in texts]
        except UnicodeDecodeError as broken:
            bad = broken.object
            line = next((number for number, raw in chunk.documents if raw == bad), 1)
            line += bad[: broken.start].count(b"\n")
            raise input_error(
                f"{chunk.path}:{line} is not UTF-8: it has the byte {bad[broken.start]:#04x}. With "
                "--tokenizer the input must be UTF-8 text. Convert the file (iconv -t UTF-8), or "
                "omit --tokenizer."
            ) from None
        if not decoded:
            return []
        encoded = self._loaded(
            decoded, return_attention_mask=False, return_token_type_ids=False, verbose=False
        )
        return [list(ids) for ids in encoded["input_ids"]]


_of_this_worker: Tokenizer | None = None


def start_worker(name: str | None, append_eod: bool) -> None:
    """Set the tokenizer of this process."""
    global _of_this_worker
    _of_this_worker = Tokenizer(name, append_eod)


def encode_in_worker(chunk: Chunk) -> Encoded:
    """`Tokenizer.encode` with the tokenizer of this process."""
    assert _of_this_worker is not None, "call start_worker() first"
    return _of_this_worker.encode(chunk)


def _load(name: str) -> Any:
    """The `transformers` tokenizer.

    Raises:
        ValueError: if it cannot be loaded, or `transformers` is not installed.
    """
    # The workers already use all cores; threads in each of them would compete.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise input_error(
            f"--tokenizer {name} needs transformers 4.50 or newer, which is not installed. Run pip "
            "install 'megatron-llr[hf]', or omit --tokenizer for byte-level tokens."
        ) from None
    reason = "no such folder"
    # A Hub name has at most one slash. Anything else is a path, for which no network is used.
    if os.path.isdir(name) or not (name.startswith((".", "/", "~")) or name.count("/") > 1):
        try:
            return AutoTokenizer.from_pretrained(name)
        except Exception as broken:  # the library raises many kinds
            reason = (str(broken).strip().splitlines() or [type(broken).__name__])[0]
    raise input_error(
        f"Cannot load --tokenizer {name}: {reason}. It must be a folder with tokenizer files, or a "
        "name on the Hugging Face Hub. Correct the name, or download it first if there is no "
        "network."
    )
