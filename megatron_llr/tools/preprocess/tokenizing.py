"""Text to token ids: byte level, or any tokenizer of `transformers`. Imported by every worker."""

import os
import shlex
import sys
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from megatron_llr.errors import input_error
from megatron_llr.tools.preprocess.byte_level import END_OF_DOCUMENT, VOCAB_SIZE
from megatron_llr.tools.preprocess.pieces import (
    CHUNK_BYTES,
    EncodedPiece,
    Piece,
    check_cut,
    cut,
    encode_piece,
)
from megatron_llr.tools.preprocess.sources import Chunk


@dataclass(frozen=True)
class Encoded:
    """Tokens of a chunk.

    Attributes:
        ids: concatenated ids of all documents.
        lengths: tokens per document, including its end token; without empty documents.
        empty: number of empty documents, which are skipped.
        read: as in the chunk.
        place: file and line number of the first document.
        left: as in `EncodedPiece`, if the chunk is a piece.
        right: as in `EncodedPiece`, if the chunk is a piece.
        continues: whether the last document continues in the next chunk.
    """

    ids: "array[int]"
    lengths: list[int]
    empty: int
    read: int
    place: str
    left: tuple[int, ...] = ()
    right: tuple[int, ...] = ()
    continues: bool = False


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
    def end_of_document(self) -> int | None:
        """The end-of-document id, chosen as Megatron does for a `transformers` tokenizer.

        None if the tokenizer has none.
        """
        if self.name is None:
            return END_OF_DOCUMENT
        ids = (self._loaded.eos_token_id, self._loaded.sep_token_id)
        return next((int(token) for token in ids if token is not None), None)

    def check_end_of_document(self) -> None:
        """Refuse to append a token that the tokenizer does not have.

        Raises:
            ValueError: with the remedies.
        """
        if self.append_eod and self.end_of_document is None:
            raise input_error(
                f"The tokenizer {self.name} has no end-of-document token. It must have an "
                'eos_token or a sep_token. Set "eos_token" in its tokenizer_config.json to a token '
                "of its vocabulary, choose another --tokenizer, or set --no-append-eod."
            )

    @property
    def training_flags(self) -> str:
        """Megatron's flags for this tokenizer, quoted for a shell."""
        if self.name is None:
            return f"--tokenizer-type NullTokenizer --vocab-size {VOCAB_SIZE}"
        if self.end_of_document is None:
            # Megatron cannot build a HuggingFaceTokenizer without an end-of-document token. As for
            # bytes, the last id is one that no document has.
            return f"--tokenizer-type NullTokenizer --vocab-size {self.vocab_size + 1}"
        return f"--tokenizer-type HuggingFaceTokenizer --tokenizer-model {shlex.quote(self.name)}"

    @property
    def takes_pieces(self) -> bool:
        """Whether long documents can be tokenized in pieces: it must know each token's position."""
        return self.name is None or bool(self._loaded.is_fast)

    @cached_property
    def _special_tokens(self) -> tuple[list[int], list[int]]:
        """Ids that the tokenizer adds before and after a document."""
        text = "a"
        with_special = list(self._loaded(text)["input_ids"])
        plain = list(self._loaded(text, add_special_tokens=False)["input_ids"])
        for start in range(len(with_special) - len(plain) + 1):
            stop = start + len(plain)
            if with_special[start:stop] == plain:
                return with_special[:start], with_special[stop:]
        return [], []

    def encode(self, chunk: Chunk) -> Encoded:
        """Tokens of every document of a chunk, including the tokenizer's special tokens.

        Raises:
            ValueError: with file and line of a document that is not text.
        """
        first = chunk.documents[0]
        place = f"{chunk.path}:{first.line}"
        ids, lengths = array("i"), []
        if first.is_part:
            if self.name is None:
                encoded = EncodedPiece(first.own)
            else:
                encoded = self._encode_piece(chunk.path, first)
            ids.extend(encoded.ids)
            if not first.after:
                self._end_document(ids, 0)
            left, right = encoded.left, encoded.right
            return Encoded(ids, [len(ids)], 0, chunk.read, place, left, right, first.after > 0)
        texts = [
            (document.line, text)
            for document, text in zip(chunk.documents, chunk.texts(), strict=True)
            if text
        ]
        if self.name is None:
            documents: Iterable[Sequence[int]] = (text for _, text in texts)
        else:
            documents = self._encode_texts(chunk.path, texts)
        for document in documents:
            before = len(ids)
            ids.extend(document)
            self._end_document(ids, before)
            if len(ids) > before:
                lengths.append(len(ids) - before)
        return Encoded(ids, lengths, len(chunk.documents) - len(lengths), chunk.read, place)

    def _end_document(self, ids: "array[int]", start: int) -> None:
        """Append the end-of-document token to a document, unless the tokenizer already did."""
        end = self.end_of_document
        if self.append_eod and end is not None and (len(ids) == start or ids[-1] != end):
            ids.append(end)

    def _encode_texts(self, path: str, texts: list[tuple[int, bytes]]) -> Iterator[list[int]]:
        """Ids of every text; a text that is too long for a chunk is tokenized in pieces."""
        longest = CHUNK_BYTES if self.takes_pieces else sys.maxsize
        whole = [_decode(path, line, text) for line, text in texts if len(text) <= longest]
        encoded: Iterator[list[int]] = iter(())
        if whole:
            flags = {"return_attention_mask": False, "return_token_type_ids": False}
            encoded = iter(self._loaded(whole, verbose=False, **flags)["input_ids"])
        for line, text in texts:
            yield next(encoded) if len(text) <= longest else self._encode_long(path, line, text)

    def _encode_long(self, path: str, line: int, text: bytes) -> list[int]:
        parts = (text[at : at + CHUNK_BYTES] for at in range(0, len(text), CHUNK_BYTES))
        ids: list[int] = []
        right: tuple[int, ...] = ()
        for piece in cut(line, parts, CHUNK_BYTES):
            encoded = self._encode_piece(path, piece)
            check_cut(right, encoded.left, f"{path}:{line}")
            ids += encoded.ids
            right = encoded.right
        return ids

    def _encode_piece(self, path: str, piece: Piece) -> EncodedPiece:
        """Ids of a piece, with the special tokens at the start and the end of the document."""
        text = _decode(path, piece.line, piece.content)
        before, own = piece.content[: piece.before].decode(), piece.own.decode()
        encoded = encode_piece(self._loaded, text, len(before), len(before) + len(own))
        first, last = self._special_tokens
        ids = [*(() if piece.before else first), *encoded.ids, *(() if piece.after else last)]
        return encoded._replace(ids=ids)


def _decode(path: str, line: int, text: bytes) -> str:
    """Text of a document that starts in this line."""
    try:
        return text.decode()
    except UnicodeDecodeError as broken:
        line += text[: broken.start].count(b"\n")
        raise input_error(
            f"{path}:{line} is not UTF-8: it has the byte {text[broken.start]:#04x}. With "
            "--tokenizer the input must be UTF-8 text. Convert the file (iconv -t UTF-8), or "
            "omit --tokenizer."
        ) from None


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
