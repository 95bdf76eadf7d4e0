"""The user's options of a conversion, and the names of its output files."""

from dataclasses import dataclass
from pathlib import Path

import torch

HUGGING_FACE = "hugging_face"
"""Folder next to a converted Megatron checkpoint: config.json and the tokenizer's files."""

TRACKER = "latest_checkpointed_iteration.txt"
"""Megatron's file that names the last checkpoint: an iteration, or `release`."""

BACKEND = "metadata.json"
"""Megatron's file in a complete checkpoint that names the format."""

FLAGS = "model_flags.txt"
"""File next to a converted Megatron checkpoint: the flags of its model, one per line."""

STATE = "layerwise_learning_rates.json"
"""File next to converted Hugging Face weights: the extension's state."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """The user's options.

    Attributes:
        dtype: of the output, or None for that of the input.
        vocab_multiple: to Megatron: the vocabulary is padded to a multiple of this many rows.
        vocab_size: to Hugging Face: rows of the vocabulary to keep; by default those of the
            config.json, or the tokenizer's size at save time if there is none.
        shard_size: to Hugging Face: bytes of an output file.
        iteration: of a Megatron checkpoint, by default the last.
        files: to Hugging Face: a folder with the config.json and tokenizer to copy, or with a
            tokenizer only.
    """

    dtype: torch.dtype | None = None
    vocab_multiple: int = 128
    vocab_size: int | None = None
    shard_size: int = 2 * 10**9
    iteration: str | None = None
    files: Path | None = None
