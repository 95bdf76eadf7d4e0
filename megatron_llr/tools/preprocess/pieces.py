"""Long documents in overlapping pieces, so that memory does not grow with their length.

A tokenizer gives other tokens near the ends of a piece than in the middle of the document. Every
piece therefore has context on both sides. Its tokens are kept up to the cut, and both pieces must
give the same tokens on both sides of the cut.
"""

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from megatron_llr.errors import input_error

# Approximate size of the chunks sent to workers: large enough to make sending cheap, small enough
# for several per worker in memory. A longer document is cut.
CHUNK_BYTES = 1 << 20

# Size of a piece without context. With the positions of its tokens it takes about 500 times as much
# memory.
PIECE_BYTES = 1 << 18

# Context on each side of a cut in bytes, and the characters on each side whose tokens must be the
# same in both pieces. These are at most 4 bytes each: the outer three quarters may differ.
CONTEXT_BYTES = 1 << 14
COMPARED_CHARACTERS = 1 << 10


class Piece(NamedTuple):
    """A document, or a part of one.

    Attributes:
        line: number of the first line of the content, starting at 1.
        content: raw bytes.
        before: bytes at the start that belong to the previous piece; 0 if there is none.
        after: bytes at the end that belong to the next piece; 0 if there is none.
    """

    line: int
    content: bytes
    before: int = 0
    after: int = 0

    @property
    def is_part(self) -> bool:
        """Whether the document has other pieces."""
        return self.before + self.after > 0

    @property
    def own(self) -> bytes:
        """The content without context."""
        return self.content[self.before : len(self.content) - self.after]


def cut(line: int, parts: Iterable[bytes], longest: int, strip: bytes = b"") -> Iterator[Piece]:
    """The pieces of one document; a single one if it is not long.

    Args:
        line: number of the first line of the document.
        parts: the content, in order.
        longest: a document of at most this many bytes is not cut.
        strip: bytes to remove from the end of the document.
    """
    content, before, long = bytearray(), 0, False
    for part in parts:
        content += part
        long = long or len(content) > longest
        while long and len(content) > before + PIECE_BYTES + CONTEXT_BYTES:
            # Tokens rarely cross the end of a line.
            last = before + PIECE_BYTES
            end = content.rfind(b"\n", last - CONTEXT_BYTES, last) + 1
            end = end or _character_start(content, last)
            stop = _character_start(content, end + CONTEXT_BYTES)
            yield Piece(line, bytes(content[:stop]), before, stop - end)
            start = _character_start(content, end - CONTEXT_BYTES)
            line += content.count(b"\n", 0, start)
            before = end - start
            del content[:start]
    yield Piece(line, bytes(content).rstrip(strip) if strip else bytes(content), before)


def _character_start(content: bytearray, position: int) -> int:
    """The start of the UTF-8 character that this byte belongs to, if it is valid."""
    for start in range(position, position - 4, -1):
        if content[start] & 0xC0 != 0x80:
            return start
    return position


class EncodedPiece(NamedTuple):
    """Tokens of a piece.

    Attributes:
        ids: without those of the context.
        left: tokens next to the cut before the piece, with their positions; empty if none is.
        right: as `left`, at the cut after the piece.
    """

    ids: Sequence[int]
    left: tuple[int, ...] = ()
    right: tuple[int, ...] = ()


def encode_piece(tokenizer: Any, text: str, start: int, stop: int) -> EncodedPiece:
    """Tokens of a piece, without special tokens.

    Args:
        tokenizer: a fast tokenizer of `transformers`, which knows the position of each token.
        text: the piece with its context.
        start: number of characters of context at the start.
        stop: position of the context at the end.
    """
    encoded = tokenizer(
        text,
        add_special_tokens=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    ids = encoded["input_ids"]
    starts = [offset[0] for offset in encoded["offset_mapping"]]

    def near(position: int) -> tuple[int, ...]:
        first = bisect_left(starts, position - COMPARED_CHARACTERS)
        last = bisect_left(starts, position + COMPARED_CHARACTERS)
        return (*(at - position for at in starts[first:last]), *ids[first:last])

    first = bisect_left(starts, start) if start else 0
    last = bisect_left(starts, stop) if stop < len(text) else len(ids)
    return EncodedPiece(
        ids[first:last],
        near(start) if start else (),
        near(stop) if stop < len(text) else (),
    )


def check_cut(right: tuple[int, ...], left: tuple[int, ...], place: str) -> None:
    """Compare the tokens at a cut: `right` of the piece before it with `left` of the one after.

    Args:
        right: as in `EncodedPiece`.
        left: as in `EncodedPiece`.
        place: file and line number, for the error.

    Raises:
        ValueError: if they differ.
    """
    if right != left:
        raise input_error(
            f"{place} is in a document too long to tokenize as a whole, and the tokenizer gives "
            f"different tokens near a cut. Documents of up to {CHUNK_BYTES} bytes are not cut. Set "
            "--documents paragraph or line, or divide the document."
        )
