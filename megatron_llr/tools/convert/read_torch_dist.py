"""Read Megatron's torch_dist checkpoints one tensor at a time, without ranks.

They are PyTorch distributed checkpoints (torch.distributed.checkpoint): an index of the parts of
every tensor, and files of parts. A layer is assembled from its parts, independent of the layout
that wrote them. `restricted_pickle` reads both: a checkpoint is not trusted.
"""

from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_llr import state
from megatron_llr.errors import input_error
from megatron_llr.tools.convert.input_files import plain_name, read_json
from megatron_llr.tools.convert.links import LAYER_PREFIX
from megatron_llr.tools.convert.options import BACKEND, TRACKER
from megatron_llr.tools.convert.restricted_pickle import FileSlice, load_archive, read_index

_COMMON = MetadataIndex("common_state/shard_0_1")
_OLDER_COMMON = "common.pt"


def _named(iteration: str) -> str:
    """Megatron's name of a checkpoint's folder."""
    return iteration if iteration == "release" else f"iter_{int(iteration):07}"


def _last(tracker: Path) -> str:
    """The iteration in the tracker file; 0 without a file."""
    if not tracker.is_file():
        return "0"
    with tracker.open(errors="replace") as file:
        iteration = file.read(100).strip()
    digits = iteration.isascii() and iteration.isdigit()
    if iteration != "release" and not (digits and len(iteration) < 20):
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
    if not (root / BACKEND).is_file():
        folder = root / _named(iteration or _last(root / TRACKER))
    elif iteration is not None and root.resolve().name != _named(iteration):
        raise input_error(
            f"{root} is the folder of one checkpoint, and not that of --iteration {iteration}. "
            "Omit --iteration, or give the folder above it, which was given to --save."
        )
    saved = folder / BACKEND
    backend = read_json(saved).get("sharded_backend") if saved.is_file() else None
    if backend != "torch_dist":
        reason = f"{BACKEND} has the format {backend}" if backend else f"no {BACKEND}"
        raise input_error(
            f"There is no complete torch_dist checkpoint in {folder}: {reason}. It must be "
            "saved with --ckpt-format torch_dist. Give the folder that was given to --save; "
            "--iteration selects a checkpoint other than the last."
        )
    return folder


def unreadable(what: str, broken: BaseException) -> ValueError:
    """The error of a damaged checkpoint, or the one that says what a checkpoint must not name."""
    if isinstance(broken, ValueError) and str(broken).startswith("megatron_llr: "):
        return broken
    reason = (str(broken).splitlines() or [""])[-1][:200]
    return input_error(
        f"Cannot read {what}: {type(broken).__name__}: {reason}. It must be a complete torch_dist "
        "checkpoint. Copy it again, or choose an earlier one with --iteration."
    )


class TorchDistReader:
    """Reads single layers of a checkpoint of any layout."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self._index = read_index(folder / ".metadata")
            _check_index(self._index)
        except Exception as broken:
            raise unreadable(f"the index of {folder}", broken) from broken
        self._check_files()

    def _check_files(self) -> None:
        """Check that every file in the index exists and is long enough for its last tensor."""
        ends: dict[str, int] = {}
        for part in self._index.storage_data.values():
            end = part.offset + part.length
            ends[part.relative_path] = max(ends.get(part.relative_path, 0), end)
        for name, end in sorted(ends.items()):
            path = self.folder / name
            size = path.stat().st_size if path.is_file() else None
            if size is None or size < end:
                problem = "is missing" if size is None else f"is truncated to {size} bytes"
                raise input_error(
                    f"{path} {problem}. It must have {end} bytes. Copy it again, or choose an "
                    "earlier checkpoint with --iteration."
                )

    def common_state(self) -> dict[str, Any]:
        """The contents other than tensors: args, and the scheduler's state with ours.

        Raises:
            ValueError: if they cannot be read, or name classes other than those of args.
        """
        older = self.folder / _OLDER_COMMON
        try:
            if older.is_file():
                with FileSlice(older, 0, older.stat().st_size) as file:
                    common = load_archive(file)
            else:
                # Megatron keeps a list of one rank's objects.
                (common,) = self._load(_COMMON)
            if not isinstance(common, dict) or not hasattr(common.get("args"), "num_layers"):
                raise TypeError("they do not contain Megatron's args")
        except Exception as broken:
            raise unreadable(f"the settings saved in {self.folder}", broken) from broken
        return common

    def _load(self, index: MetadataIndex) -> Any:
        part = self._index.storage_data[index]
        path = self.folder / part.relative_path
        with FileSlice(path, part.offset, part.length) as file:
            return load_archive(file)

    @property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Key -> shape of every tensor, optimizer included."""
        entries = self._index.state_dict_metadata.items()
        return {k: tuple(v.size) for k, v in entries if isinstance(v, TensorStorageMetadata)}

    def dtype(self, key: str, layer: int | None) -> torch.dtype:
        """Dtype of one layer's tensor, without reading it."""
        return self._saved(self._place(key, layer)[0]).properties.dtype

    def _place(self, key: str, layer: int | None) -> tuple[str, int | None]:
        """Key and index in the checkpoint: layers are stacked or stored separately."""
        if layer is None or not key.startswith(LAYER_PREFIX):
            return key, None
        single = f"{LAYER_PREFIX}{layer}.{key.removeprefix(LAYER_PREFIX)}"
        if single in self._index.state_dict_metadata:
            return single, None
        return key, layer

    def _saved(self, key: str) -> TensorStorageMetadata:
        saved = self._index.state_dict_metadata.get(key)
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
        saved = self._index.state_dict_metadata.get(key)
        return saved.size[0] if isinstance(saved, TensorStorageMetadata) and saved.size else 1

    @property
    def depth(self) -> int:
        """Number of layers that the checkpoint can have at most, stacked or stored separately."""
        layers = {k.removeprefix(LAYER_PREFIX).split(".")[0] for k in self.tensors}
        stacked = (v[0] for k, v in self.tensors.items() if k.startswith(LAYER_PREFIX) and v)
        return max(len(layers), *stacked, 0)

    def read(self, key: str, layer: int | None) -> torch.Tensor:
        """One layer's full tensor, in its saved dtype."""
        place, index = self._place(key, layer)
        saved = self._saved(place)
        size, offsets = list(saved.size), [0] * len(saved.size)
        if index is not None:
            offsets[0], size[0] = index, 1
        chunk = ChunkStorageMetadata(torch.Size(offsets), torch.Size(size))
        dtype = saved.properties.dtype
        try:
            items = create_read_items_for_chunk_list(place, saved, [chunk])
            for item in items:
                # Checked before memory is allocated for it.
                held = self._index.storage_data[item.storage_index]
                if held.length < prod(item.lengths) * dtype.itemsize:
                    raise ValueError(f"its part in {held.relative_path} is shorter than its shape")
            if sum(prod(item.lengths) for item in items) != prod(size):
                raise ValueError("its parts do not add up to the tensor")
            target = torch.zeros(size, dtype=dtype)
            for item in items:
                part = self._load(item.storage_index)
                if part.dtype != dtype:
                    raise ValueError(f"a part has dtype {part.dtype} instead of {dtype}")
                values = part[_block(item.storage_offsets, item.lengths)]
                target[_block(item.dest_offsets, item.lengths)] = values
        except Exception as broken:
            raise unreadable(f"{place} of {self.folder}", broken) from broken
        return target if index is None else target[0]


def _block(offsets: torch.Size, lengths: torch.Size) -> tuple[slice, ...]:
    return tuple(slice(o, o + n) for o, n in zip(offsets, lengths, strict=True))


def _check_index(index: Metadata) -> None:
    """Check the types and ranges of what the reader uses.

    Raises:
        Exception: of any type, if an entry is not as torch.distributed.checkpoint writes it.
    """
    for key, entry in index.state_dict_metadata.items():
        if not isinstance(key, str):
            raise TypeError("a key is not a string")
        if isinstance(entry, BytesStorageMetadata):
            continue
        bounds = _sizes(entry.size)
        if not isinstance(entry.properties.dtype, torch.dtype):
            raise TypeError(f"{key[:80]} has no dtype")
        for chunk in entry.chunks:
            first, lengths = _sizes(chunk.offsets), _sizes(chunk.sizes)
            ends = [start + length for start, length in zip(first, lengths, strict=True)]
            if any(end > bound for end, bound in zip(ends, bounds, strict=True)):
                raise ValueError(f"a part of {key[:80]} is outside the tensor")
    for place, part in index.storage_data.items():
        if not isinstance(place, MetadataIndex) or not isinstance(part, _StorageInfo):
            raise TypeError("an entry of the index is not the place of a tensor")
        if not plain_name(part.relative_path):
            raise ValueError(
                f"it names the file {str(part.relative_path)[:80]!r}, not in the folder"
            )
        _sizes((part.offset, part.length))
        if part.transform_descriptors:
            raise ValueError(f"{part.relative_path} is compressed")


def _sizes(numbers: Any) -> tuple[int, ...]:
    """Non-negative integers.

    Raises:
        TypeError: if they are anything else.
    """
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise TypeError("a size is not a non-negative integer")
    return tuple(numbers)


def layerwise_state(common: Mapping[str, Any]) -> dict[str, Any] | None:
    """The state document of this package in the contents other than tensors, or None.

    Args:
        common: from `TorchDistReader.common_state`.

    Raises:
        ValueError: if it cannot be read.
    """
    scheduler = common.get("opt_param_scheduler")
    return state.decode(scheduler.get(state.KEY)) if isinstance(scheduler, dict) else None
