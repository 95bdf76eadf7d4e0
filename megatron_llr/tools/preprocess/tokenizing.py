"""Text to token ids: byte level, or any tokenizer of `transformers`. Loaded by every worker."""

import os
import shlex
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from megatron_llr.errors import user_error
from megatron_llr.tools.preprocess.byte_level import END_OF_DOCUMENT, VOCAB_SIZE
from megatron_llr.tools.preprocess.sources import Chunk


@dataclass(frozen=True)
class Encoded:
    """Tokens of a chunk.

    Attributes:
        ids: of all documents, one after the other.
        lengths: tokens per document, its end included; empty documents are left out.
        empty: number of documents left out.
        read: as in the chunk.
    """

    ids: "array[int]"
    lengths: list[int]
    empty: int
    read: int


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer by its name, loaded where it is first used.

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
        """Number of ids, added tokens included."""
        return VOCAB_SIZE if self.name is None else len(self._loaded)

    @cached_property
    def end_of_document(self) -> int:
        """The id that ends a document; as Megatron reads it from a `transformers` tokenizer.

        Raises:
            ValueError: if the tokenizer has none.
        """
        if self.name is None:
            return END_OF_DOCUMENT
        ids = (self._loaded.eos_token_id, self._loaded.sep_token_id)
        found = next((token for token in ids if token is not None), None)
        if found is None:
            raise user_error(
                f"the tokenizer {self.name} has no token that ends a document",
                got="neither eos_token nor sep_token",
                allowed="one of them",
                remedy="set --no-append-eod, or take another tokenizer",
            )
        return int(found)

    @property
    def training_flags(self) -> str:
        """Megatron's flags that name this tokenizer, as a shell reads them."""
        if self.name is None:
            return f"--tokenizer-type NullTokenizer --vocab-size {VOCAB_SIZE}"
        return f"--tokenizer-type HuggingFaceTokenizer --tokenizer-model {shlex.quote(self.name)}"

    def encode(self, chunk: Chunk) -> Encoded:
        """Tokens of every document of a chunk, special tokens of the tokenizer's own included.

        Raises:
            ValueError: naming file and line of a document that is no text.
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
            # Some tokenizers end every text themselves.
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
            raise user_error(
                f"{chunk.path}:{line} is not UTF-8",
                got=f"byte {bad[broken.start]:#04x}",
                allowed="UTF-8 text",
                remedy="convert the file (iconv -t UTF-8), or leave --tokenizer out",
            ) from None
        if not decoded:
            return []
        encoded = self._loaded(
            decoded, return_attention_mask=False, return_token_type_ids=False, verbose=False
        )
        return [list(ids) for ids in encoded["input_ids"]]


_of_this_worker: Tokenizer | None = None


def start_worker(name: str | None, append_eod: bool) -> None:
    """Give this process its tokenizer."""
    global _of_this_worker
    _of_this_worker = Tokenizer(name, append_eod)


def encode_in_worker(chunk: Chunk) -> Encoded:
    """`Tokenizer.encode` of this process's tokenizer."""
    assert _of_this_worker is not None, "start_worker() comes first"
    return _of_this_worker.encode(chunk)


def _load(name: str) -> Any:
    """The `transformers` tokenizer.

    Raises:
        ValueError: if there is none of that name, or no `transformers`.
    """
    # Workers are processes; threads inside each would only get in one another's way.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise user_error(
            f"--tokenizer {name} needs the package transformers",
            got="none installed",
            allowed="transformers 4.50 or newer",
            remedy="pip install 'megatron-llr[hf]', or leave --tokenizer out for byte level",
        ) from None
    got = "no such folder"
    # A Hub name has one slash at most; anything else is a path and asks no network.
    if os.path.isdir(name) or not (name.startswith((".", "/", "~")) or name.count("/") > 1):
        try:
            return AutoTokenizer.from_pretrained(name)
        except Exception as broken:  # the library raises many kinds
            got = (str(broken).strip().splitlines() or [type(broken).__name__])[0]
    raise user_error(
        f"cannot load --tokenizer {name}",
        got=got,
        allowed="a folder with tokenizer files, or the name of one on the Hugging Face Hub",
        remedy="correct the name, or download it first where there is no network",
    )
