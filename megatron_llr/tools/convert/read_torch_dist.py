"""Read Megatron's torch_dist checkpoints one tensor at a time, without ranks.

They are PyTorch distributed checkpoints (torch.distributed.checkpoint). A custom planner makes
their reader load one layer at a time, independent of the layout that wrote them.
"""

import io
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_llr.errors import input_error
from megatron_llr.tools.convert.links import LAYER_PREFIX
from megatron_llr.tools.convert.options import BACKEND, TRACKER
from megatron_llr.tools.convert.settings import read_json


def _named(iteration: str) -> str:
    """Megatron's name of a checkpoint's folder."""
    return iteration if iteration == "release" else f"iter_{int(iteration):07}"


def _last(tracker: Path) -> str:
    """The iteration in the tracker file; 0 without a file."""
    if not tracker.exists():
        return "0"
    iteration = tracker.read_text(errors="replace").strip()
    if iteration != "release" and not (iteration.isascii() and iteration.isdigit()):
        raise input_error(
            f"{tracker} contains {iteration[:40]!r}. It must contain the number of an iteration, "
            "or release. Choose a checkpoint with --iteration."
        )
    return iteration


def iteration_folder(root: Path, iteration: str | None = None) -> Path:
    """The folder of one checkpoint: `root/iter_0000100`, `root/release`, or `root` itself.

    Args:
        root: the folder given to Megatron's `--save`, or the folder of one iteration.
        iteration: a number or `release`; by default the one in the tracker file.

    Raises:
        ValueError: if there is none, it does not have the torch_dist format, or root is the folder
            of another iteration.
    """
    folder = root
    if not (root / BACKEND).exists():
        folder = root / _named(iteration or _last(root / TRACKER))
    elif iteration is not None and root.resolve().name != _named(iteration):
        raise input_error(
            f"{root} is the folder of one checkpoint, and not that of --iteration {iteration}. "
            "Omit --iteration, or give the folder above it, which was given to --save."
        )
    saved = folder / BACKEND
    backend = read_json(saved).get("sharded_backend") if saved.exists() else None
    if backend != "torch_dist":
        format_found = f"{BACKEND} has the format {backend}" if backend else f"no {BACKEND}"
        raise input_error(
            f"There is no complete torch_dist checkpoint in {folder}: {format_found}. It must be "
            "saved with --ckpt-format torch_dist. Give the folder that was given to --save; "
            "--iteration selects a checkpoint other than the last."
        )
    return folder


def unreadable(what: str, broken: BaseException) -> ValueError:
    """The error of a damaged checkpoint."""
    reason = str(broken).splitlines()[-1] if str(broken) else ""
    return input_error(
        f"Cannot read {what}: {type(broken).__name__}: {reason}. It must be a complete torch_dist "
        "checkpoint. Copy it again, or choose an earlier one with --iteration."
    )


class _Fetch(LoadPlanner):
    """Copies the items of one read into one tensor."""

    def __init__(self, target: torch.Tensor) -> None:
        self.target = target

    def set_up_planner(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to plan: the items are given."""

    def create_local_plan(self) -> LoadPlan:
        raise AssertionError("the plan is given")

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise AssertionError("no bytes are requested")

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        place = zip(read_item.dest_offsets, read_item.lengths, strict=True)
        return self.target[tuple(slice(first, first + length) for first, length in place)]

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        """The tensor is a view of the target."""


class TorchDistReader:
    """Reads single layers of a checkpoint of any layout."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._storage = FileSystemReader(folder)
        try:
            self._metadata = self._storage.read_metadata()
        except Exception as broken:
            raise unreadable(f"the index of {folder}", broken) from broken
        self._check_files()
        self._storage.set_up_storage_reader(self._metadata, is_coordinator=True)

    def _check_files(self) -> None:
        """Check that every file in the index exists and is long enough for its last tensor."""
        ends: dict[str, int] = {}
        for piece in self._metadata.storage_data.values():
            end = piece.offset + piece.length
            ends[piece.relative_path] = max(ends.get(piece.relative_path, 0), end)
        for name, end in sorted(ends.items()):
            path = self.folder / name
            size = path.stat().st_size if path.exists() else None
            if size is None or size < end:
                problem = "is missing" if size is None else f"is truncated to {size} bytes"
                raise input_error(
                    f"{path} {problem}. It must have {end} bytes. Copy it again, or choose an "
                    "earlier checkpoint with --iteration."
                )

    @property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Key -> shape of every tensor, optimizer included."""
        entries = self._metadata.state_dict_metadata.items()
        return {k: tuple(v.size) for k, v in entries if isinstance(v, TensorStorageMetadata)}

    def dtype(self, key: str, layer: int | None) -> torch.dtype:
        """Dtype of one layer's tensor, without reading it."""
        return self._saved(self._place(key, layer)[0]).properties.dtype

    def _place(self, key: str, layer: int | None) -> tuple[str, int | None]:
        """Key and index in the checkpoint: layers are stacked or stored separately."""
        if layer is None or not key.startswith(LAYER_PREFIX):
            return key, None
        single = f"{LAYER_PREFIX}{layer}.{key.removeprefix(LAYER_PREFIX)}"
        if single in self._metadata.state_dict_metadata:
            return single, None
        return key, layer

    def _saved(self, key: str) -> TensorStorageMetadata:
        saved = self._metadata.state_dict_metadata.get(key)
        if not isinstance(saved, TensorStorageMetadata):
            raise input_error(
                f"{self.folder} has no tensor {key}. It must have the tensors of a dense GPT model "
                "with SwiGLU and RMSNorm: mixtures of experts, MLA and hybrid models cannot be "
                "converted."
            )
        return saved

    def shape(self, key: str, layer: int | None) -> tuple[int, ...]:
        """Shape of one layer's tensor, without reading it."""
        place, index = self._place(key, layer)
        size = tuple(self._saved(place).size)
        return size if index is None else size[1:]

    def layers(self, key: str) -> int:
        """Number of stacked layers, or 1 if layers are stored separately."""
        saved = self._metadata.state_dict_metadata.get(key)
        return int(saved.size[0]) if isinstance(saved, TensorStorageMetadata) else 1

    def read(self, key: str, layer: int | None) -> torch.Tensor:
        """One layer's full tensor, in its saved dtype."""
        place, index = self._place(key, layer)
        saved = self._saved(place)
        size, offsets = list(saved.size), [0] * len(saved.size)
        if index is not None:
            offsets[0], size[0] = index, 1
        target = torch.empty(size, dtype=saved.properties.dtype)
        chunk = ChunkStorageMetadata(torch.Size(offsets), torch.Size(size))
        items = create_read_items_for_chunk_list(place, saved, [chunk])
        try:
            self._storage.read_data(LoadPlan(items), _Fetch(target)).wait()
        except Exception as broken:
            raise unreadable(f"{place} of {self.folder}", broken) from broken
        return target if index is None else target[0]
