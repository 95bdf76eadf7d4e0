"""The files that accompany weights in a Hugging Face folder: config.json and the tokenizer's."""

import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_llr.errors import input_error

CONFIG = "config.json"

# Tokenizers and chat templates; never weights or their index.
_TOKENIZER = re.compile(
    r"(tokenizer.*|special_tokens_map\.json|added_tokens\.json|vocab\.(json|txt)|merges\.txt"
    r"|spiece\.model|chat_template.*)$"
)
_MODEL = re.compile(r"(generation_config\.json|config\.json)$")
# A tokenizer needs one of them; the other files only add to it.
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")

_SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class Tokenizer:
    """A Hugging Face tokenizer in a folder.

    Attributes:
        folder: the folder.
        size: number of tokens, added ones included, as Megatron counts them.
        special: settings of config.json -> token id, or None.
    """

    folder: Path
    size: int
    special: Mapping[str, int | None]


def has_tokenizer(folder: Path) -> bool:
    """Whether the folder has the vocabulary of a tokenizer."""
    return any((folder / name).is_file() for name in _VOCABULARIES)


def read_tokenizer(folder: Path) -> Tokenizer:
    """Load a tokenizer from a folder, without network and without running its code.

    Raises:
        ValueError: if transformers cannot load it.
    """
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        special = {name: getattr(loaded, name) for name in _SPECIAL}
        return Tokenizer(folder, len(loaded), special)
    except Exception as broken:
        reason = " ".join(str(broken).split())[:300]
        raise input_error(
            f"transformers cannot load the tokenizer in {folder}: {type(broken).__name__}: "
            f"{reason}. It must be a folder that save_pretrained wrote. Choose another with "
            "--files."
        ) from broken


def loads_differently(tokenizer: Tokenizer, copy: Path) -> list[str]:
    """A note if transformers loads another tokenizer from a copy next to a config.json.

    For some model types, such as qwen2, `AutoTokenizer` (5.23) uses the class of the model instead
    of the one that tokenizer_config.json names, and that class can add tokens.
    """
    loaded = read_tokenizer(copy)
    if (loaded.size, loaded.special) == (tokenizer.size, tokenizer.special):
        return []
    return [
        f"AutoTokenizer loads {loaded.size} tokens from the copy instead of {tokenizer.size}, "
        "because of the model_type; use PreTrainedTokenizerFast"
    ]


def copy_model_files(source: Path, target: Path) -> list[str]:
    """Copy config.json and the settings of generation; returns their names."""
    return _copy(source, target, _MODEL)


def copy_tokenizer(source: Path, target: Path) -> list[str]:
    """Copy the tokenizer's files; returns their names."""
    return _copy(source, target, _TOKENIZER)


def _copy(source: Path, target: Path, pattern: re.Pattern[str]) -> list[str]:
    names = sorted(p.name for p in source.iterdir() if pattern.match(p.name) and p.is_file())
    target.mkdir(exist_ok=True)
    for name in names:
        shutil.copyfile(source / name, target / name)
    return names
