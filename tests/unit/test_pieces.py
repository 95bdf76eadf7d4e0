"""Long documents that are tokenized in pieces have the tokens of the whole document."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from megatron_llr.tools.preprocess import pieces, tokenizing
from megatron_llr.tools.preprocess.byte_level import standard_library_sources
from megatron_llr.tools.preprocess.pieces import cut
from megatron_llr.tools.preprocess.sources import Chunk
from megatron_llr.tools.preprocess.tokenizing import Tokenizer

TEXT = b"".join(list(standard_library_sources())[:12]).decode("utf-8", "replace")
WORDS = "über naïve 世界 мир 😀 e\u0301 \u200b"


def byte_level() -> tuple[Backend, Any]:
    """As GPT-2 and Llama 3."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return backend, trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet,
        show_progress=False,
    )  # fmt: skip


def sentence_piece() -> tuple[Backend, Any]:
    """As Llama 2: no pre-tokenization, a blank before the text, merges across words."""
    backend = Backend(models.BPE(unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokens = ["<s>", "</s>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    return backend, trainers.BpeTrainer(
        vocab_size=700, special_tokens=tokens, show_progress=False, max_token_length=12
    )


def word_piece() -> tuple[Backend, Any]:
    """As BERT: characters are removed and replaced before tokenizing."""
    backend = Backend(models.WordPiece(unk_token="<unk>"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return backend, trainers.WordPieceTrainer(
        vocab_size=600, special_tokens=["<s>", "</s>", "<unk>"], show_progress=False
    )


@pytest.fixture(scope="module", params=[byte_level, sentence_piece, word_piece])
def tokenizer(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Tokenizer:
    make: Callable[[], tuple[Backend, Any]] = request.param
    backend, trainer = make()
    backend.train_from_iterator([*TEXT[:40_000].splitlines(), WORDS], trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    return Tokenizer(str(folder), append_eod=True)


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (pieces, tokenizing):
        monkeypatch.setattr(module, "CHUNK_BYTES", 1000)
    monkeypatch.setattr(pieces, "PIECE_BYTES", 1000)
    monkeypatch.setattr(pieces, "CONTEXT_BYTES", 400)
    monkeypatch.setattr(pieces, "COMPARED_CHARACTERS", 25)


def in_pieces(tokenizer: Tokenizer, text: bytes) -> list[int]:
    """Tokens of one document, joined as in `preprocess`."""
    parts = (text[at : at + 1000] for at in range(0, len(text), 1000))
    ids: list[int] = []
    right: tuple[int, ...] = ()
    for piece in cut(1, parts, 1000):
        encoded = tokenizer.encode(Chunk("in.txt", None, (piece,), 0))
        pieces.check_cut(right, encoded.left, encoded.place)
        assert encoded.continues == (piece.after > 0)
        right = encoded.right
        ids += encoded.ids
    return ids


def as_a_whole(tokenizer: Tokenizer, text: bytes) -> list[int]:
    return list(tokenizer._loaded(text.decode())["input_ids"])


MIXED = (
    st.lists(
        st.one_of(
            st.integers(0, len(TEXT) - 3000).map(lambda at: TEXT[at : at + 900]),
            st.sampled_from(WORDS.split()).map(lambda word: (word + " ") * 60),
            st.text(max_size=80),
            st.sampled_from(["\n\n\n", "\r\n", " " * 70, "\t\t"]),
        ),
        min_size=3,
        max_size=12,
    )
    .map(lambda parts: "".join(parts).encode("utf-8", "replace"))
    .filter(bool)
)


@pytest.mark.usefixtures("small_pieces")
@given(text=MIXED)
def test_tokens_of_pieces_are_those_of_the_document(tokenizer: Tokenizer, text: bytes) -> None:
    assert in_pieces(tokenizer, text) == as_a_whole(tokenizer, text)


@pytest.mark.usefixtures("small_pieces")
def test_ordinary_text_is_never_refused(tokenizer: Tokenizer) -> None:
    """Source code of 300 pieces, as plain text and as a JSON line."""
    text = TEXT.encode()[:300_000].decode("utf-8", "ignore").encode()
    whole = as_a_whole(tokenizer, text)
    assert in_pieces(tokenizer, text) == whole
    line = json.dumps({"text": text.decode()}).encode()
    chunk = Chunk("in.jsonl", "text", tuple(cut(1, iter([line]), len(line))), 0)
    encoded = tokenizer.encode(chunk)
    assert encoded.ids.tolist() == whole
    assert encoded.lengths == [len(whole)]


@pytest.mark.usefixtures("small_pieces")
def test_a_cut_that_changes_tokens_is_refused(tokenizer: Tokenizer) -> None:
    """Blanks are grouped from the start of their run, which here is outside the context.

    Tokenizers that drop blanks do not depend on it.
    """
    text = b"a" + b" " * 5001
    if len(as_a_whole(tokenizer, text)) < 10:
        assert in_pieces(tokenizer, text) == as_a_whole(tokenizer, text)
        return
    with pytest.raises(
        ValueError,
        match=r"in.txt:1 is in a document too long .* different tokens near a cut. "
        "Documents of up to 1000 bytes are not cut. Set --documents paragraph or line",
    ):
        in_pieces(tokenizer, text)


@pytest.mark.usefixtures("small_pieces")
def test_invalid_utf8_is_named_by_its_line(tokenizer: Tokenizer) -> None:
    text = b"one line of text\n" * 1000 + b"\xff\n" + b"one line of text\n" * 100
    with pytest.raises(ValueError, match=r"in.txt:1001 is not UTF-8: it has the byte 0xff"):
        in_pieces(tokenizer, text)


def test_a_tokenizer_without_positions_takes_no_pieces(tmp_path: Path) -> None:
    """One in Python, which `transformers` has for some models."""
    from transformers import CanineTokenizer

    CanineTokenizer().save_pretrained(tmp_path)
    assert not Tokenizer(str(tmp_path), append_eod=True).takes_pieces
    assert Tokenizer(None, append_eod=True).takes_pieces
