"""Hugging Face folders of safetensors, read and written one tensor at a time."""

import contextlib
import json
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatron_llr.errors import user_error
from megatron_llr.output import cannot_write
from megatron_llr.tools.convert.settings import read_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
CONFIG = "config.json"

# Tokenizers, chat templates, generation settings and model cards; never weights or their index.
_CARRIED = re.compile(
    r"(tokenizer.*|special_tokens_map\.json|added_tokens\.json|vocab\.(json|txt)|merges\.txt"
    r"|spiece\.model|chat_template.*|generation_config\.json|config\.json)$"
)


def carry_files(source: Path, target: Path) -> list[str]:
    """Copy config.json and the tokenizer's files; returns their names."""
    names = sorted(p.name for p in source.iterdir() if _CARRIED.match(p.name) and p.is_file())
    target.mkdir(exist_ok=True)
    for name in names:
        shutil.copyfile(source / name, target / name)
    return names


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
    """Where a tensor lies, and what it is."""

    file: str
    shape: tuple[int, ...]
    dtype: str


class SafetensorsFolder:
    """Reads tensors of a folder with one `model.safetensors`, else with shards and an index.

    A file is mapped while one tensor is copied out of it, so that memory holds that tensor alone.
    Opening reads every header: missing and truncated files are found before anything is written.

    Raises:
        ValueError: if files are missing or broken, or hold other tensors than the index says.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.entries: dict[str, Entry] = {}
        index = self._index()
        for file in sorted(set(index.values())) or [SINGLE]:
            self._read_header(file)
        lost = sorted(set(index) - set(self.entries))
        if lost:
            raise user_error(
                f"{folder} lacks tensors that its index names",
                got=f"{lost[0]} is not in {index[lost[0]]} ({len(lost)} in all)",
                allowed="an index that fits its shards",
                remedy="copy the folder anew",
            )

    def _index(self) -> dict[str, str]:
        # One file comes before an index that may be older, as in transformers.
        if (self.folder / SINGLE).exists():
            return {}
        if not (self.folder / INDEX).exists():
            raise user_error(
                f"no weights in {self.folder}",
                got="neither of the two files",
                allowed=f"{SINGLE}, or {INDEX} and its shards",
                remedy="load a model of pickled weights with transformers and save it anew",
            )
        weight_map = read_json(self.folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise user_error(
                f"{self.folder / INDEX} lists no tensors",
                got="no weight_map",
                allowed="an index as transformers writes it",
                remedy="copy the folder anew",
            )
        return {str(name): str(file) for name, file in weight_map.items()}

    @contextlib.contextmanager
    def _open(self, file: str) -> Iterator[Any]:
        from safetensors import SafetensorError, safe_open

        path = self.folder / file
        try:
            with safe_open(path, framework="pt") as handle:
                yield handle
        except (OSError, SafetensorError) as broken:
            raise user_error(
                f"cannot read {path}",
                got=f"{type(broken).__name__}: {broken}",
                allowed="a whole safetensors file",
                remedy="copy it anew",
            ) from broken

    def _read_header(self, file: str) -> None:
        with self._open(file) as handle:
            for name in handle.keys():  # noqa: SIM118 (not a dict)
                part = handle.get_slice(name)
                self.entries[name] = Entry(file, tuple(part.get_shape()), part.get_dtype())

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor, without reading it.

        Raises:
            ValueError: if it is quantised.
        """
        found = self.entries[name].dtype
        if found not in _DTYPES:
            raise user_error(
                f"{name} is not stored as plain floating-point numbers",
                got=found,
                allowed=", ".join(_DTYPES),
                remedy="dequantise the model with transformers and save it anew",
            )
        return _DTYPES[found]

    def same(self, name: str, other: str) -> bool:
        """Whether two tensors have the same shape, dtype and numbers."""
        one, two = self.entries[name], self.entries[other]
        if (one.shape, one.dtype) != (two.shape, two.dtype):
            return False
        return torch.equal(self.read(name), self.read(other))

    def read(self, name: str) -> torch.Tensor:
        """A tensor, in its own dtype, with memory of its own."""
        with self._open(self.entries[name].file) as handle:
            tensor: torch.Tensor = handle.get_tensor(name).clone()
        return tensor


@dataclass
class Shards:
    """Writes tensors, as they come, into files of a bounded size, and the index at the end.

    The files' final names hold their number, which is known at the end: they are renamed then.

    Attributes:
        folder: where to.
        limit: bytes of a shard; a tensor larger than that gets one of its own.
    """

    folder: Path
    limit: int
    _open: dict[str, torch.Tensor] = field(default_factory=dict)
    _size: int = 0
    _files: list[list[str]] = field(default_factory=list)
    _total: int = 0

    def add(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Take tensors over; writes a shard whenever the next would not fit."""
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
        """Write what is left, and the index; returns the names of the files."""
        if self._open:
            self._flush()
        names = list(self._names())
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

    def _names(self) -> Iterator[str]:
        count = len(self._files)
        if count == 1:
            yield SINGLE
        else:
            for number in range(1, count + 1):
                yield f"model-{number:05}-of-{count:05}.safetensors"
