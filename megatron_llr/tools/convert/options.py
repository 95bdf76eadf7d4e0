"""What a user chooses of a conversion, and the names of the files that it leaves."""

from dataclasses import dataclass
from pathlib import Path

import torch

HUGGING_FACE = "hugging_face"
"""Folder beside a converted Megatron checkpoint: config.json and the tokenizer's files."""

TRACKER = "latest_checkpointed_iteration.txt"
"""Megatron's file that names the last checkpoint: an iteration, or `release`."""

BACKEND = "metadata.json"
"""Megatron's file in a whole checkpoint: it names the format."""

FLAGS = "model_flags.txt"
"""File beside a converted Megatron checkpoint: the flags of its model, one per line."""

STATE = "layerwise_learning_rates.json"
"""File beside converted Hugging Face weights: the extension's state."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a user may choose.

    Attributes:
        dtype: of the output, or None for that of the input.
        vocab_multiple: towards Megatron, rows of the vocabulary are padded to a multiple of it.
        vocab_size: towards Hugging Face, rows of the vocabulary to keep; by default those of the
            config.json at hand, else those that Megatron's own args name.
        shard_size: towards Hugging Face, bytes of an output file.
        iteration: of a Megatron checkpoint, by default the last.
        files: towards Hugging Face, a folder with the config.json and tokenizer to carry over.
    """

    dtype: torch.dtype | None = None
    vocab_multiple: int = 128
    vocab_size: int | None = None
    shard_size: int = 2 * 10**9
    iteration: str | None = None
    files: Path | None = None
