"""`MatrixShard`: what one rank knows of the part of a logical matrix that it holds."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from megatron_llr.matrices.ids import MatrixId
from megatron_llr.matrices.layout import Placement

Initializer = Callable[[Any], Callable[[torch.Tensor], object]]
"""The model's configuration -> what fills a tensor with initial weights."""


@dataclass(frozen=True, eq=False)
class MatrixShard:
    """The part of one logical matrix that this rank holds.

    Attributes:
        matrix: its id.
        parameter_id: id of the Megatron parameter that holds it (`block.3.attention.qkv`).
        parameter: that parameter, [local rows, local columns].
        rows: rows of the whole logical matrix.
        columns: its columns.
        placements: what each rank of `ranks` holds, in their order.
        ranks: global ranks that hold the matrix between them, tensor-parallel order.
        group: process group of `ranks`.
        copy: whether the parameter is a copy kept for another pipeline stage (tied embeddings).
        initializer: what the model draws the matrix with.
    """

    matrix: MatrixId
    parameter_id: str
    parameter: torch.nn.Parameter
    rows: int
    columns: int
    placements: tuple[Placement, ...]
    ranks: tuple[int, ...]
    group: Any
    copy: bool = False
    initializer: Initializer = field(kw_only=True)

    @property
    def placement(self) -> Placement:
        """What this rank holds."""
        if len(self.ranks) == 1:
            return self.placements[0]
        return self.placements[self.ranks.index(dist.get_rank())]

    @property
    def split(self) -> bool:
        """Whether the ranks hold different parts, rather than the whole matrix each."""
        # Any of them may hold nothing: key and value rows of few query groups lie on every n-th.
        return any(placement != self.placements[0] for placement in self.placements)
