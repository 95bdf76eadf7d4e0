"""Initial weights that depend on the seed alone.

Megatron draws each rank's part of a weight by itself: on a GPU from a generator of its
tensor-parallel rank, on every pipeline stage from another seed, and where gate and up are fused the
same draw lands in other matrices when the layout changes. Here every logical matrix is drawn whole,
on the CPU, from a seed made of `--seed` and its id, with Megatron's own initializer for it, and
each rank keeps its part.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.utils import unwrap_model

from megatron_llr.matrices.shard import MatrixShard


def _seed_of(matrix: str, seed: int) -> int:
    digest = hashlib.sha256(f"{seed} {matrix}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _draw(shard: MatrixShard, seed: int, config: Any) -> torch.Tensor:
    """The whole matrix, [rows, columns] fp32 on CPU."""
    whole = torch.empty(shard.rows, shard.columns, dtype=torch.float32, device="cpu")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_seed_of(shard.matrix, seed))
        shard.initializer(config)(whole)
    return whole


@torch.no_grad()
def draw_weights(
    model_chunks: Sequence[torch.nn.Module], shards: Sequence[MatrixShard], seed: int
) -> None:
    """Draw all matrices again; norms and biases stay.

    Call before the optimizer is built, which copies the weights.

    Args:
        model_chunks: model chunks of this rank, wrapped or not.
        shards: catalog of this rank, padding of the vocabulary included.
        seed: `--seed`.
    """
    config = unwrap_model(model_chunks[0]).config
    if not config.perform_initialization:
        return
    for shard in shards:
        whole, placement = _draw(shard, seed, config), shard.placement
        columns = slice(placement.first_column, placement.first_column + placement.columns)
        for span in placement.spans:
            part = whole[span.logical : span.logical + span.count, columns]
            shard.parameter[span.local : span.local + span.count].copy_(part)
