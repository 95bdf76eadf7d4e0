"""Walk the model chunks of this rank and name every logical matrix that it holds a part of."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from megatron_llr import host
from megatron_llr.errors import user_error
from megatron_llr.sharding.families import (
    BLOCK_WEIGHTS,
    MODEL_WEIGHTS,
    WHOLE,
    RowLayout,
    TransformerShape,
)
from megatron_llr.sharding.layout import Placement, Span
from megatron_llr.sharding.shard import MatrixShard

_VOCABULARY = ("embedding", "head")
_LAYER = re.compile(r"^decoder\.layers\.\d+$")


def _dimension(parameter: torch.nn.Parameter) -> int | None:
    """Axis along which tensor parallelism splits the parameter, or None."""
    # Duplicated linears of Transformer Engine keep partition_dim 0 but clear the first attribute.
    if not getattr(parameter, "tensor_model_parallel", False):
        return None
    axis: int = parameter.partition_dim  # type: ignore[attr-defined]
    return axis


def _shards(
    prefix: str,
    cluster: str,
    parameter: torch.nn.Parameter,
    layout: RowLayout,
    shape: TransformerShape,
    group: Any,
) -> Iterator[MatrixShard]:
    """The matrices of one parameter, with every tensor-parallel rank's part of them."""
    ranks = tuple(dist.get_process_group_ranks(group))
    rows, columns = parameter.shape
    axis = _dimension(parameter)
    by_rank = [layout(shape, rows, shard if axis == 0 else 0) for shard in range(len(ranks))]
    roles = sorted(set().union(*by_rank))
    for role in roles:
        placements = tuple(
            Placement(
                spans.get(role, ()),
                shard * columns if axis == 1 else 0,
                columns,
            )
            for shard, spans in enumerate(by_rank)
        )
        held = [span for placement in placements for span in placement.spans]
        yield MatrixShard(
            matrix=f"{prefix}.{role}" if role else prefix,
            cluster=cluster,
            parameter=parameter,
            rows=max(span.logical + span.count for span in held),
            columns=columns * (len(ranks) if axis == 1 else 1),
            placements=placements,
            ranks=ranks,
            group=group,
        )


def _clip_rows(shard: MatrixShard, rows: int | None) -> MatrixShard:
    """Leave out rows that only pad the vocabulary: their number depends on the layout."""
    if rows is None or rows >= shard.rows:
        return shard
    placements = tuple(
        replace(
            placement,
            spans=tuple(
                Span(span.local, span.logical, min(span.count, rows - span.logical))
                for span in placement.spans
                if span.logical < rows
            ),
        )
        for placement in shard.placements
    )
    return replace(shard, rows=rows, placements=placements)


def _block_numbers(model: torch.nn.Module) -> dict[str, int]:
    """Module name of every layer in this chunk -> its global block number, from 0."""
    # layer_number counts from 1 over all pipeline stages, virtual stages and custom layouts.
    return {
        name: int(module.layer_number) - 1
        for name, module in model.named_modules()
        if _LAYER.match(name)
    }


def _locate(
    name: str, parameter: torch.nn.Parameter, blocks: dict[str, int], tied: bool
) -> tuple[str, str, RowLayout] | None:
    """(id prefix, cluster, layout) of a weight, or None if no table row knows it."""
    if name in MODEL_WEIGHTS:
        matrix = MODEL_WEIGHTS[name]
        if matrix == "head" and tied:
            matrix = "embedding"
        return matrix, matrix, WHOLE
    for layer, block in blocks.items():
        if name.startswith(layer + "."):
            path = name.removeprefix(layer + ".")
            for rule in BLOCK_WEIGHTS:
                if path == rule.path:
                    prefix = f"block.{block}.{rule.prefix}"
                    return prefix, f"{prefix}.{rule.parameter}", rule.layout
    return None


def build_catalog(
    model_chunks: Sequence[torch.nn.Module], *, vocab_size: int | None = None
) -> list[MatrixShard]:
    """Every logical matrix that this rank holds a part of.

    Vectors (norms, biases) and frozen weights are left out: their multiplier is 1.

    Args:
        model_chunks: as `get_megatron_optimizer` takes them, wrapped or not.
        vocab_size: rows of embedding and head before padding; without it padding is measured too.

    Returns:
        Shards in the order of the model's parameters.

    Raises:
        ValueError: naming every weight that has no place in the tables of `sharding.families`.
    """
    chunks = list(model_chunks)
    groups = host.process_groups(chunks)
    shards: list[MatrixShard] = []
    unplaced: list[str] = []
    for chunk in chunks:
        model: Any = host.unwrap_model(chunk)
        shape = TransformerShape.of(model.config)
        tied = bool(getattr(model, "share_embeddings_and_output_weights", False))
        blocks = _block_numbers(model)
        for name, parameter in model.named_parameters():
            if parameter.ndim < 2 or not parameter.requires_grad:
                continue
            found = _locate(name, parameter, blocks, tied) if parameter.ndim == 2 else None
            if found is None:
                unplaced.append(f"{name} {tuple(parameter.shape)}")
                continue
            prefix, cluster, layout = found
            copy = tied and name == "output_layer.weight"
            for shard in _shards(prefix, cluster, parameter, layout, shape, groups.tp):
                clipped = _clip_rows(shard, vocab_size) if shard.matrix in _VOCABULARY else shard
                shards.append(replace(clipped, copy=copy))
    if unplaced:
        raise user_error(
            "weights that no table places",
            got="; ".join(unplaced),
            allowed="the weights of dense GPT models",
            remedy="train this model without --llr-* flags, or add a row to "
            "megatron_llr/sharding/families.py",
        )
    return shards
