"""Hugging Face folders of safetensors, read and written one tensor at a time."""

import contextlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatron_llr.errors import input_error, shown
from megatron_llr.output import and_more, cannot_write
from megatron_llr.tools.convert.input_files import plain_name, read_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_ADAPTER = "adapter_config.json"


def dtype_name(dtype: torch.dtype) -> str:
    """`float32` of torch.float32."""
    return str(dtype).removeprefix("torch.")


# What safetensors calls the dtypes that a converted weight can have.
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


@dataclass(frozen=True)
class Entry:
    """File, shape and dtype of a tensor."""

    file: str
    shape: tuple[int, ...]
    dtype: str


class SafetensorsFolder:
    """Reads tensors of a folder with one `model.safetensors`, or with shards and an index.

    As in transformers, `model.safetensors` takes precedence over an index, and files that the index
    does not name are not read. Of a tensor that is in several shards, the one that the index names
    is read. Files are memory-mapped while one tensor is copied, so memory holds only that tensor.
    The constructor reads all headers: missing and truncated files raise before anything is written.

    Attributes:
        folder: the folder.
        entries: the tensors by name.
        notes: what was not read although it is there.

    Raises:
        ValueError: if files are missing or damaged, or do not match the index.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.notes: list[str] = []
        if (folder / _ADAPTER).exists():
            raise input_error(
                f"{folder} has an adapter ({_ADAPTER}), which transformers adds to the weights. "
                "The weights must be those of the whole model. Merge the adapter with peft and "
                "save the result."
            )
        # The single file takes precedence over an index that may be older, as in transformers.
        if (folder / SINGLE).exists():
            self.entries = self._header(SINGLE)
            if (folder / INDEX).exists():
                self.notes.append(f"not read: {INDEX}, because there is {SINGLE}")
        else:
            self.entries = self._indexed(self._index())

    def _index(self) -> dict[str, str]:
        """Name of every tensor -> its file."""
        path = self.folder / INDEX
        if not path.exists():
            raise input_error(
                f"There are no weights in {self.folder}. It must have {SINGLE}, or {INDEX} and its "
                "shards. Load pickled weights with transformers and save them as safetensors."
            )
        weight_map = read_json(path).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise input_error(
                f"{path} lists no tensors: it has no weight_map. It must be an index in the format "
                "of transformers. Copy the folder again."
            )
        for name, file in weight_map.items():
            if not plain_name(file):
                raise input_error(
                    f"{path} places {name[:80]} in {shown(file)}. It must be the name of a file in "
                    "the same folder. Copy the folder again."
                )
        return weight_map

    def _indexed(self, index: dict[str, str]) -> dict[str, Entry]:
        """The tensors that the index lists, where it places them."""
        headers = {file: self._header(file) for file in sorted(set(index.values()))}
        for name, file in index.items():
            if name not in headers[file]:
                others = [other for other, header in headers.items() if name in header]
                state = f"it is in {others[0]}" if others else "no file has it"
                raise input_error(
                    f"The index of {self.folder} places {name[:80]} in {file}, but {state}. The "
                    "index must match the shards. Copy the folder again."
                )
        for file, header in headers.items():
            unlisted = sorted(header.keys() - index.keys())
            if unlisted:
                raise input_error(
                    f"{self.folder / file} has tensors that the index does not list: "
                    f"{and_more(unlisted)}. The index must match the shards. Copy the folder again."
                )
            copies = [name for name in header if index[name] != file]
            if copies:
                self.notes.append(f"not read in {file}: {and_more(copies)}, by the index")
        return {name: headers[file][name] for name, file in index.items()}

    @contextlib.contextmanager
    def _open(self, file: str) -> Iterator[Any]:
        from safetensors import SafetensorError, safe_open

        path = self.folder / file
        try:
            if path.exists() and not path.is_file():
                raise OSError("not a regular file")
            with safe_open(path, framework="pt") as handle:
                yield handle
        except (OSError, SafetensorError) as broken:
            raise input_error(
                f"Cannot read {path}: {type(broken).__name__}: {broken}. It must be a complete "
                "safetensors file. Copy it again."
            ) from broken

    def _header(self, file: str) -> dict[str, Entry]:
        """The tensors of one file."""
        entries: dict[str, Entry] = {}
        with self._open(file) as handle:
            for name in handle.keys():  # noqa: SIM118 (not a dict)
                part = handle.get_slice(name)
                entries[name] = Entry(file, tuple(part.get_shape()), part.get_dtype())
        return entries

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor, without reading it.

        Raises:
            ValueError: if it is quantized.
        """
        stored = self.entries[name].dtype
        if stored not in _DTYPES:
            raise input_error(
                f"{name} is stored as {stored}, not as plain floating point. It must be one of "
                f"{', '.join(_DTYPES)}. Dequantize the model with transformers and save it again."
            )
        return _DTYPES[stored]

    def same(self, name: str, other: str) -> bool:
        """Whether two tensors have the same shape, dtype and values."""
        one, two = self.entries[name], self.entries[other]
        if (one.shape, one.dtype) != (two.shape, two.dtype):
            return False
        return torch.equal(self.read(name), self.read(other))

    def read(self, name: str) -> torch.Tensor:
        """A copy of a tensor in its stored dtype."""
        with self._open(self.entries[name].file) as handle:
            tensor: torch.Tensor = handle.get_tensor(name).clone()
        return tensor


@dataclass
class Shards:
    """Writes a stream of tensors into files of bounded size, and the index at the end.

    The final file names contain the number of files, so the files are renamed at the end.

    Attributes:
        folder: output folder.
        limit: bytes of a shard; a larger tensor gets its own.
    """

    folder: Path
    limit: int
    _open: dict[str, torch.Tensor] = field(default_factory=dict)
    _size: int = 0
    _files: list[list[str]] = field(default_factory=list)
    _total: int = 0

    def add(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Add tensors; writes a shard whenever the next tensor would not fit."""
        for name, tensor in tensors:
            size = tensor.numel() * tensor.element_size()
            if self._open and self._size + size > self.limit:
                self._flush()
            self._open[name] = tensor
            self._size += size

    def _path(self, number: int) -> Path:
        return self.folder / f"shard-{number}.safetensors"

    def _flush(self) -> None:
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        try:
            save_file(self._open, self._path(len(self._files)), metadata={"format": "pt"})
        except (OSError, SafetensorError) as failed:
            raise cannot_write(self.folder, failed) from failed
        self._files.append(list(self._open))
        self._total += self._size
        self._open.clear()
        self._size = 0

    def close(self) -> list[str]:
        """Write the last shard and the index; returns the names of the files."""
        if self._open:
            self._flush()
        count = len(self._files)
        names = [f"model-{n:05}-of-{count:05}.safetensors" for n in range(1, count + 1)]
        if count == 1:
            names = [SINGLE]
        for number, name in enumerate(names):
            self._path(number).rename(self.folder / name)
        if len(names) > 1:
            places = zip(names, self._files, strict=True)
            weight_map = {tensor: name for name, tensors in places for tensor in tensors}
            index = {
                "metadata": {"total_size": self._total},
                "weight_map": dict(sorted(weight_map.items())),
            }
            (self.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        return names
