"""How many rows of the vocabulary an exported model keeps, and which tokenizer it gets."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_llr.errors import input_error, shown
from megatron_llr.tools.convert.input_files import read_json
from megatron_llr.tools.convert.options import HUGGING_FACE, Options
from megatron_llr.tools.convert.tokenizer_files import (
    CONFIG,
    Tokenizer,
    has_tokenizer,
    read_tokenizer,
)

# Tokenizers of Megatron that load a Hugging Face tokenizer from --tokenizer-model.
_HUGGING_FACE_TYPES = ("HuggingFaceTokenizer", "SFTTokenizer")
# Those whose size is --vocab-size, plus this many tokens.
_SIZED_BY_FLAG = {"NullTokenizer": 0, "NullMultimodalTokenizer": 1, "TikTokenizer": 0, None: 0}


@dataclass
class Vocabulary:
    """What accompanies the weights.

    Attributes:
        rows: of the embedding to keep.
        config: a config.json to copy, or None to make one.
        folder: with the tokenizer to copy, or None.
        tokenizer: that tokenizer where it does not come with the config.json, or None.
        special: special token ids for a config.json that is made.
        notes: what the user should know.
    """

    rows: int
    config: Path | None
    folder: Path | None
    tokenizer: Tokenizer | None
    special: Mapping[str, int | None]
    notes: list[str] = field(default_factory=list)


def vocabulary_of(args: Any, folder: Path, padded: int, options: Options) -> Vocabulary:
    """Choose rows, config.json and tokenizer of an export.

    The rows are those of `--vocab-size`, else of the config.json to copy, else the tokenizer's size
    when the checkpoint was saved. A config.json may have more rows than the tokenizer has tokens,
    as Qwen's.

    Args:
        args: Megatron's args in the checkpoint.
        folder: of the checkpoint's iteration.
        padded: rows of the embedding in the checkpoint.
        options: `files` and `vocab_size` are used.

    Raises:
        ValueError: if a folder has neither config.json nor tokenizer, the tokenizer has more tokens
            than rows are kept, or the checkpoint has fewer rows.
    """
    converted = folder.parent / HUGGING_FACE
    given = options.files if options.files is not None else converted
    if options.files is not None and not ((given / CONFIG).is_file() or has_tokenizer(given)):
        raise input_error(
            f"There is neither {CONFIG} nor a tokenizer in {given}. --files must be a Hugging Face "
            f"folder with one of them. Without --files, {CONFIG} is made from Megatron's args."
        )
    configs = [each / CONFIG for each in (given, converted) if (each / CONFIG).is_file()]
    config = configs[0] if configs else None
    notes: list[str] = []
    tokenizer = None
    if not has_tokenizer(given):
        tokenizer = _trained_with(args, padded, notes) if config is None else None
    elif config is None or config.parent != given:
        tokenizer = read_tokenizer(given)
    rows = _rows(args, padded, options, config, tokenizer)
    special: dict[str, int | None] = {"bos_token_id": None, "eos_token_id": None}
    if tokenizer is not None:
        special = dict(tokenizer.special)
    if special["eos_token_id"] is None:
        special["eos_token_id"] = _end_of_document(args, rows)
    source = tokenizer.folder if tokenizer is not None else given if has_tokenizer(given) else None
    return Vocabulary(rows, config, source, tokenizer, special, notes)


def _rows(
    args: Any, padded: int, options: Options, config: Path | None, tokenizer: Tokenizer | None
) -> int:
    """Rows to keep: not more than there are, nor fewer than the tokenizer's tokens."""
    rows = options.vocab_size
    if rows is None and config is not None:
        rows = read_json(config).get("vocab_size")
    if rows is None:
        rows = _size_at_save(args) or min(padded, tokenizer.size if tokenizer else padded)
    if type(rows) is not int or not 0 < rows <= padded:
        raise input_error(
            f"The vocabulary size {shown(rows)} is not valid for this checkpoint. It must be 1 to "
            f"{padded}. Set it with --vocab-size."
        )
    if tokenizer is not None and tokenizer.size > rows:
        raise input_error(
            f"The tokenizer in {tokenizer.folder} has {tokenizer.size} tokens, but the model keeps "
            f"{rows} rows. It must have a row for every token. Choose the tokenizer of the model "
            f"with --files, or keep up to {padded} rows with --vocab-size."
        )
    return rows


def _size_at_save(args: Any) -> int | None:
    """The tokenizer's size when the checkpoint was saved, or None if it is not known.

    The pretraining script records it. Without it --vocab-size counts only for the tokenizers that
    take their size from it: others ignore the flag.
    """
    recorded = _natural(getattr(args, "llr_vocab_size", None))
    kind = getattr(args, "tokenizer_type", None)
    flag = _natural(getattr(args, "vocab_size", None))
    if recorded is not None or flag is None or kind not in _SIZED_BY_FLAG:
        return recorded
    return flag + _SIZED_BY_FLAG[kind]


def _natural(value: Any) -> int | None:
    return value if type(value) is int and value >= 0 else None


def _trained_with(args: Any, padded: int, notes: list[str]) -> Tokenizer | None:
    """The Hugging Face tokenizer that Megatron's args name, if its folder is here and unchanged."""
    if getattr(args, "tokenizer_type", None) not in _HUGGING_FACE_TYPES:
        return None
    folder = Path(str(getattr(args, "tokenizer_model", None)))
    reason = "is not a folder here"
    if folder.is_dir() and has_tokenizer(folder):
        tokenizer = read_tokenizer(folder)
        size = _size_at_save(args)
        # Tokens that Megatron's --special-tokens added are not in the folder.
        unchanged = tokenizer.size == size or size is None or getattr(args, "special_tokens", None)
        if unchanged and tokenizer.size <= (size or padded):
            return tokenizer
        reason = f"has {tokenizer.size} tokens, but the model was trained with {size or padded}"
    notes.append(f"no tokenizer: {str(folder)[:200]} {reason}; add one with --files DIR")
    return None


def _end_of_document(args: Any, rows: int) -> int | None:
    """Id of the end-of-document token, from what was recorded or from a NullTokenizer's flags."""
    token = getattr(args, "llr_eod_id", None)
    if token is None and getattr(args, "tokenizer_type", None) == "NullTokenizer":
        token = getattr(args, "null_tokenizer_eod_id", None)
        last = _natural(getattr(args, "vocab_size", None))
        token = last - 1 if token is None and last is not None else token
    token = _natural(token)
    return token if token is not None and token < rows else None
