"""Write a Megatron torch_dist checkpoint one tensor at a time, without ranks.

It is a PyTorch distributed checkpoint (torch.distributed.checkpoint). A custom planner makes each
tensor when the writer needs it. Megatron can load the result in any layout.
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
class SavedTensor:
    """A tensor written under one key: one layer of a stack, or the full tensor.

    Attributes:
        key: in the checkpoint.
        layer: index in the stack, or None.
        shape: of the tensor, without the stack.
        layers: length of the stack.
        dtype: of the tensor, the same for all layers of a stack.
    """

    key: str
    layer: int | None
    shape: tuple[int, ...]
    layers: int
    dtype: torch.dtype


class _Stream(SavePlanner):
    """Makes every tensor when the writer needs it, and releases it afterwards."""

    def __init__(
        self,
        tensors: Mapping[MetadataIndex, SavedTensor],
        make: Callable[[SavedTensor], torch.Tensor],
        objects: Mapping[str, Any],
    ) -> None:
        self.tensors = tensors
        self.make = make
        self.objects = objects

    def set_up_planner(
        self,
        state_dict: dict[str, Any],
        storage_meta: StorageMeta | None = None,
        is_coordinator: bool = False,
    ) -> None:
        """Nothing to set up: the tensors are given."""

    def create_local_plan(self) -> SavePlan:
        items = [
            WriteItem(index=MetadataIndex(key), type=WriteItemType.BYTE_IO) for key in self.objects
        ]
        for index, entry in self.tensors.items():
            stack, offset = ((), ()) if entry.layer is None else ((entry.layers,), (entry.layer,))
            sizes = (*((1,) * len(stack)), *entry.shape)
            chunk = ChunkStorageMetadata(
                torch.Size((*offset, *((0,) * len(entry.shape)))), torch.Size(sizes)
            )
            data = TensorWriteData(
                chunk=chunk,
                properties=TensorProperties(dtype=entry.dtype),
                size=torch.Size((*stack, *entry.shape)),
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
        entry = self.tensors[write_item.index]
        tensor = self.make(entry).contiguous()
        assert tuple(tensor.shape) == entry.shape, (entry, tensor.shape)
        assert tensor.dtype == entry.dtype, (entry, tensor.dtype)
        return tensor if entry.layer is None else tensor.unsqueeze(0)


def write_torch_dist(
    folder: Path,
    tensors: list[SavedTensor],
    make: Callable[[SavedTensor], torch.Tensor],
    objects: Mapping[str, Any],
) -> None:
    """Write a checkpoint of Megatron's torch_dist format.

    Args:
        folder: an existing empty folder.
        tensors: the tensors to write, in order.
        make: makes one tensor; called once for each, in sequence.
        objects: key -> plain Python object, including `common_state`.
    """
    placed: dict[MetadataIndex, SavedTensor] = {}
    for entry in tensors:
        inside = (0,) * len(entry.shape)
        offset = inside if entry.layer is None else (entry.layer, *inside)
        placed[MetadataIndex(entry.key, torch.Size(offset))] = entry
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
        # Raise the cause instead of a list of ranks. For a full disk PyTorch reports
        # "unexpected pos".
        cause, _ = next(iter(failed.failures.values()))
        if isinstance(cause, OSError | RuntimeError):
            cause = cannot_write(folder, cause)
        raise cause from failed
    backend = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    (folder / BACKEND).write_text(json.dumps(backend))
