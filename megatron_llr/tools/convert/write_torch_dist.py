"""Write a Megatron torch_dist checkpoint one tensor at a time, without ranks.

It is a PyTorch distributed checkpoint (torch.distributed.checkpoint); a planner of our own makes
each tensor when the writer asks for it. Megatron reads the result at any layout.
"""

import io
import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.state_dict_saver import save

from megatron_llr.output import cannot_write
from megatron_llr.tools.convert.options import BACKEND


@dataclass(frozen=True)
class Piece:
    """What is written under one key: one layer of a stack, or the whole tensor.

    Attributes:
        key: in the checkpoint.
        layer: index in the stack, or None.
        shape: of the piece.
        layers: length of the stack.
        dtype: of the piece, the same along a stack.
    """

    key: str
    layer: int | None
    shape: tuple[int, ...]
    layers: int
    dtype: torch.dtype


class _Stream(SavePlanner):
    """Makes every tensor when the writer asks for it, and lets it go afterwards."""

    def __init__(
        self,
        pieces: Mapping[MetadataIndex, Piece],
        make: Callable[[Piece], torch.Tensor],
        objects: Mapping[str, Any],
    ) -> None:
        self.pieces = pieces
        self.make = make
        self.objects = objects

    def set_up_planner(
        self,
        state_dict: dict[str, Any],
        storage_meta: StorageMeta | None = None,
        is_coordinator: bool = False,
    ) -> None:
        """What there is to save is given."""

    def create_local_plan(self) -> SavePlan:
        items = [
            WriteItem(index=MetadataIndex(key), type=WriteItemType.BYTE_IO) for key in self.objects
        ]
        for index, piece in self.pieces.items():
            stack, offset = ((), ()) if piece.layer is None else ((piece.layers,), (piece.layer,))
            sizes = (*((1,) * len(stack)), *piece.shape)
            chunk = ChunkStorageMetadata(
                torch.Size((*offset, *((0,) * len(piece.shape)))), torch.Size(sizes)
            )
            data = TensorWriteData(
                chunk=chunk,
                properties=TensorProperties(dtype=piece.dtype),
                size=torch.Size((*stack, *piece.shape)),
            )
            items.append(WriteItem(index=index, type=WriteItemType.SHARD, tensor_data=data))
        return SavePlan(items)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        return create_default_global_save_plan(all_plans)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        if write_item.type is WriteItemType.BYTE_IO:
            stream = io.BytesIO()
            # Megatron keeps a list of one rank's objects under a key.
            torch.save([self.objects[write_item.index.fqn]], stream)
            stream.seek(0)
            return stream
        piece = self.pieces[write_item.index]
        tensor = self.make(piece).contiguous()
        assert tuple(tensor.shape) == piece.shape, (piece, tensor.shape)
        assert tensor.dtype == piece.dtype, (piece, tensor.dtype)
        return tensor if piece.layer is None else tensor.unsqueeze(0)


def write_torch_dist(
    folder: Path,
    pieces: list[Piece],
    make: Callable[[Piece], torch.Tensor],
    objects: Mapping[str, Any],
) -> None:
    """Write a checkpoint of Megatron's torch_dist format.

    Args:
        folder: exists, and is empty.
        pieces: what to write, in order.
        make: gives a piece's tensor; called once for each, one after the other.
        objects: key -> plain Python object, `common_state` among them.
    """
    placed: dict[MetadataIndex, Piece] = {}
    for piece in pieces:
        inside = (0,) * len(piece.shape)
        offset = inside if piece.layer is None else (piece.layer, *inside)
        placed[MetadataIndex(piece.key, torch.Size(offset))] = piece
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            save(
                {},
                storage_writer=FileSystemWriter(folder, overwrite=False),
                planner=_Stream(placed, make, objects),
                no_dist=True,
            )
    except CheckpointException as failed:
        # What went wrong, rather than a list of ranks. PyTorch calls a full disk
        # "unexpected pos".
        cause, _ = next(iter(failed.failures.values()))
        if isinstance(cause, OSError | RuntimeError):
            cause = cannot_write(folder, cause)
        raise cause from failed
    backend = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    (folder / BACKEND).write_text(json.dumps(backend))
