"""Walk the model chunks of this rank and name every logical matrix that it holds a part of."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.utils import unwrap_model
from torch.distributed.tensor import DTensor

from megatron_llr.errors import topology_error, user_error
from megatron_llr.matrices.ids import MatrixId
from megatron_llr.matrices.layout import Placement, Span
from megatron_llr.matrices.shard import Initializer, MatrixShard
from megatron_llr.megatron.layers import Scope, find_scopes, split_name
from megatron_llr.megatron.model_chunks import process_groups
from megatron_llr.megatron.weight_names import (
    MODEL_WEIGHTS,
    NO_MATRICES,
    PREDICTION_WEIGHTS,
    HeldRows,
    RowLayout,
    SingleWeight,
    TransformerShape,
    find_rule,
    whole,
)

VOCABULARY = ("embedding", "head")
"""Matrices with a row per token of the vocabulary."""


@dataclass(frozen=True, eq=False)
class Catalog:
    """What a rank holds.

    Attributes:
        shards: in the order of the model's parameters.
        unknown: weights that no table places, each with its shape.
    """

    shards: tuple[MatrixShard, ...]
    unknown: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Place:
    """What the tables say of a parameter.

    Attributes:
        parameter: its own id, as `block.3.attention.qkv`; its matrices differ in the last word.
        layout: rows of the roles it holds.
        initializer: what Megatron draws it with.
        of_expert: whether it is sharded over the expert's groups.
        copy: whether another stage holds the original.
    """

    parameter: MatrixId
    layout: RowLayout
    initializer: Initializer
    of_expert: bool = False
    copy: bool = False


def _dimension(parameter: torch.nn.Parameter) -> int | None:
    """Axis along which tensor parallelism splits the parameter, or None."""
    # Duplicated linears of Transformer Engine keep partition_dim 0 but clear the first attribute.
    if not getattr(parameter, "tensor_model_parallel", False):
        return None
    axis: int = parameter.partition_dim  # type: ignore[attr-defined]
    return axis


def _shards(
    place: _Place, parameter: torch.nn.Parameter, shape: TransformerShape, group: Any
) -> Iterator[MatrixShard]:
    """The matrices of one parameter, with every tensor-parallel rank's part of them."""
    ranks = tuple(dist.get_process_group_ranks(group))
    rows, columns = parameter.shape
    axis = _dimension(parameter)
    sections = tuple(getattr(parameter, "partition_sizes", ()))
    by_rank = [
        place.layout(
            shape,
            HeldRows(rows, shard, len(ranks), sections)
            if axis == 0
            else HeldRows(rows, sections=sections),
        )
        for shard in range(len(ranks))
    ]
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
            matrix=place.parameter.sibling(role),
            parameter_id=str(place.parameter),
            parameter=parameter,
            rows=max(span.logical + span.count for span in held),
            columns=columns * (len(ranks) if axis == 1 else 1),
            placements=placements,
            ranks=ranks,
            group=group,
            copy=place.copy,
            initializer=place.initializer,
        )


def without_padding(
    shards: Sequence[MatrixShard], vocab_size: int | None
) -> tuple[MatrixShard, ...]:
    """Leave out rows that only pad the vocabulary: their number depends on the layout.

    Args:
        shards: of a catalog.
        vocab_size: rows of embedding and head before padding; None leaves the padding in.
    """
    if vocab_size is None:
        return tuple(shards)
    return tuple(
        _clip_rows(shard, vocab_size) if shard.matrix in VOCABULARY else shard for shard in shards
    )


def _clip_rows(shard: MatrixShard, rows: int) -> MatrixShard:
    if rows >= shard.rows:
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


class _Locator:
    """Looks the weights of one chunk up in the tables.

    Args:
        model: the chunk, unwrapped.
        first_expert: global number of this rank's first expert.
    """

    def __init__(self, model: Any, first_expert: int) -> None:
        self._tied = bool(getattr(model, "share_embeddings_and_output_weights", False))
        self._first_stage = bool(getattr(model, "pre_process", True))
        self._last_stage = bool(getattr(model, "post_process", True))
        self._scopes = find_scopes(model)
        self._first_expert = first_expert

    def find(self, name: str) -> _Place | None:
        """The place of a weight, or None if no table row knows it."""
        if name in MODEL_WEIGHTS:
            return self._outside(MODEL_WEIGHTS[name])
        layer = split_name(name, self._scopes)
        return self._inside(*layer) if layer else None

    def is_no_matrix(self, name: str) -> bool:
        """Whether the tables know a tensor of many dimensions as none of this package's concern."""
        layer = split_name(name, self._scopes)
        return layer is not None and layer[1] in NO_MATRICES

    def _outside(self, weight: SingleWeight) -> _Place:
        # Stages that predict several tokens keep an embedding, and a head, of their own, and so
        # does the last stage where the two are tied: Megatron keeps all of them equal.
        original = self._last_stage
        if weight.role != "head" or self._tied:
            original = self._first_stage
            if weight.role == "head":
                weight = MODEL_WEIGHTS["embedding.word_embeddings.weight"]
        matrix = MatrixId(weight.role)
        return _Place(matrix, whole(weight.role), weight.initializer, copy=not original)

    def _inside(self, scope: Scope, path: str) -> _Place | None:
        if path in PREDICTION_WEIGHTS:
            weight = PREDICTION_WEIGHTS[path]
            return _Place(scope.matrix_id(weight.role), whole(weight.role), weight.initializer)
        rule, expert = find_rule(path) or (None, None)
        if rule is None:
            return None
        if expert is not None:
            expert += self._first_expert
        parameter = scope.matrix_id(rule.parameter, rule.module, expert)
        return _Place(parameter, rule.layout, rule.initializer, rule.of_expert)


def _first_expert(config: Any, groups: Any) -> int:
    """Global number of the first expert that this rank holds: they are dealt out in order."""
    if not getattr(config, "num_moe_experts", None):
        return 0
    local: int = config.num_moe_experts // dist.get_world_size(groups.ep)
    return local * dist.get_rank(groups.ep)


def _require_whole_weights(name: str, parameter: torch.nn.Parameter) -> None:
    """Refuse weights that are cut in ways the catalog does not follow.

    Raises:
        RuntimeError: naming the flags.
    """
    remedy = "leave the flag out, or train this model without --llr-* flags"
    if getattr(parameter, "is_gtp_weight_remat", False):
        raise topology_error(
            "a weight is cut over a group of its own (GTP)",
            got=f"{name}, --tensor-parallel-num-weight-shards above 1",
            allowed="--tensor-parallel-num-weight-shards 1",
            remedy=remedy,
        )
    if isinstance(parameter, DTensor):
        raise topology_error(
            "a weight is cut over the data-parallel ranks (FSDP)",
            got=f"{name}, --use-megatron-fsdp or --use-torch-fsdp2",
            allowed="--use-distributed-optimizer, which leaves weights whole",
            remedy=remedy,
        )


def build_catalog(
    model_chunks: Sequence[torch.nn.Module], *, vocab_size: int | None = None
) -> Catalog:
    """Every logical matrix that this rank holds a part of.

    Vectors (norms, biases) and frozen weights are left out: their multiplier is 1.

    Args:
        model_chunks: as `get_megatron_optimizer` takes them, wrapped or not.
        vocab_size: rows of embedding and head before padding; without it padding is included.

    Raises:
        RuntimeError: if weights are cut in ways that are not followed (GTP, FSDP).
    """
    chunks = list(model_chunks)
    groups = process_groups(chunks)
    shards: list[MatrixShard] = []
    unknown: list[str] = []
    for chunk in chunks:
        model: Any = unwrap_model(chunk)
        shape = TransformerShape.of(model.config)
        locator = _Locator(model, _first_expert(model.config, groups))
        for name, parameter in model.named_parameters():
            if parameter.ndim < 2 or not parameter.requires_grad:
                continue
            if locator.is_no_matrix(name):
                continue
            _require_whole_weights(name, parameter)
            place = locator.find(name) if parameter.ndim == 2 else None
            if place is None:
                unknown.append(f"{name} {tuple(parameter.shape)}")
                continue
            group = groups.expt_tp if place.of_expert else groups.tp
            shards.extend(_shards(place, parameter, shape, group))
    return Catalog(without_padding(shards, vocab_size), tuple(unknown))


def require_known(unknown: Sequence[str]) -> None:
    """Refuse weights that no table places.

    Args:
        unknown: of all ranks.

    Raises:
        ValueError: naming them.
    """
    if unknown:
        raise user_error(
            "weights that no table places",
            got="; ".join(unknown),
            allowed="the weights in the tables of megatron_llr/megatron/weight_names.py",
            remedy="--llr-skip-unknown trains them at the base learning rate; or add a row there",
        )
