"""Matrix ids in tests: tables keyed by text become tables keyed by `MatrixId`."""

import re
from collections.abc import Mapping

import torch

from megatron_llr.matrices.ids import MatrixId
from megatron_llr.matrices.info import MatrixInfo
from megatron_llr.matrices.layout import Placement
from megatron_llr.matrices.shard import MatrixShard
from megatron_llr.megatron.weight_names import INPUT

_HUGGING_FACE = re.compile(r"model\.layers\.(\d+)\.(?:self_attn|mlp)\.(\w+)_proj(?:\.weight)?")


def by_id[V](table: Mapping[str, V]) -> dict[MatrixId, V]:
    """The same table, keyed by ids."""
    return {MatrixId.read(text): value for text, value in table.items()}


def info(
    matrix: str,
    parameter_id: str = "",
    rows: int = 64,
    columns: int = 64,
    holders: tuple[tuple[int, ...], ...] = ((0,),),
    split: bool = False,
) -> MatrixInfo:
    """A `MatrixInfo` of a matrix that is a parameter of its own, unless its id is given."""
    return MatrixInfo(MatrixId.read(matrix), parameter_id or matrix, rows, columns, holders, split)


def shard_of(
    matrix: str,
    parameter: torch.nn.Parameter,
    placements: tuple[Placement, ...],
    rows: int,
    columns: int,
    ranks: tuple[int, ...] = (0,),
    copy: bool = False,
) -> MatrixShard:
    """A `MatrixShard` of a parameter without a process group."""
    return MatrixShard(
        MatrixId.read(matrix),
        matrix,
        parameter,
        rows,
        columns,
        placements,
        ranks,
        None,
        copy,
        initializer=INPUT,
    )


def from_hugging_face(name: str) -> MatrixId:
    """The id of a module of LLaMA in transformers, as the official code names matrices."""
    match = _HUGGING_FACE.fullmatch(name)
    assert match is not None, name
    block, role = match.groups()
    module = "attention" if role in "qkvo" else "mlp"
    return MatrixId(role, container=f"block.{block}", module=module)
