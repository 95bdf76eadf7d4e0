"""Read the pickles of a checkpoint that is not trusted.

A pickle can call any importable function while it is read. These readers know the few classes that
a checkpoint contains, and refuse every other name before anything of it is called. They also bound
memory by the size of the file.
"""

import io
import pickle
import zipfile
from argparse import Namespace
from pathlib import Path, PurePosixPath
from typing import IO, Any, ClassVar, cast

import torch
from torch.distributed.checkpoint import filesystem, metadata, planner
from torch.serialization import _get_layout

from megatron_llr.errors import input_error

_INDEX_CLASSES = {
    metadata: (
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    ),
    filesystem: ("_StorageInfo",),
    # Megatron keeps the plans of all ranks in the index, to reuse them for the next checkpoint.
    planner: ("SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"),
}
_INDEX_GLOBALS: dict[str, Any] = {
    "torch.Size": torch.Size,
    "torch.serialization._get_layout": _get_layout,
    # The folder of the checkpoint when it was written; Python 3.13 moved the class.
    "pathlib.PosixPath": PurePosixPath,
    "pathlib._local.PosixPath": PurePosixPath,
    **{str(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)},
    **{
        f"{module.__name__}.{name}": getattr(module, name)
        for module, names in _INDEX_CLASSES.items()
        for name in names
    },
}
_INDEX_TYPES = tuple(value for value in _INDEX_GLOBALS.values() if isinstance(value, type))

# All that pickle protocols 2 to 5 need for plain data and instances of classes. Absent are, for
# example, numbers and strings of unlimited length, and calls with keywords.
_OPCODES = (
    "PROTO FRAME STOP MARK MEMOIZE BINPUT LONG_BINPUT BINGET LONG_BINGET NONE NEWTRUE NEWFALSE "
    "BININT BININT1 BININT2 LONG1 BINFLOAT SHORT_BINUNICODE BINUNICODE EMPTY_TUPLE TUPLE TUPLE1 "
    "TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS EMPTY_DICT SETITEM SETITEMS GLOBAL STACK_GLOBAL "
    "REDUCE NEWOBJ BUILD"
).split()


class RefusedNameError(Exception):
    """A pickle names an object that a checkpoint does not contain."""


# Python's own unpickler in Python, of which the type checker knows no attributes.
_PythonUnpickler: Any = pickle._Unpickler


class _IndexUnpickler(_PythonUnpickler):  # type: ignore[misc]
    """An unpickler with fewer opcodes, names and dict keys.

    The C version allocates what an opcode asks for before it reads the data.
    """

    dispatch: ClassVar[dict[int, Any]] = {
        getattr(pickle, name)[0]: _PythonUnpickler.dispatch[getattr(pickle, name)[0]]
        for name in _OPCODES
    }

    def find_class(self, module: str, name: str) -> Any:
        full_name = f"{module}.{name}"
        if full_name not in _INDEX_GLOBALS:
            raise RefusedNameError(full_name)
        return _INDEX_GLOBALS[full_name]

    def _build(self) -> None:
        # An instance only: a class would be changed for the whole process.
        if not isinstance(self.stack[-2], _INDEX_TYPES):
            raise pickle.UnpicklingError("BUILD of an object that is not of the index's classes")
        self.load_build()

    def _set_items(self) -> None:
        # The hash of nested tuples can take exponential time.
        for key in self.stack[::2]:
            _check_key(key)
        self.load_setitems()

    def _set_item(self) -> None:
        _check_key(self.stack[-2])
        self.load_setitem()

    dispatch[pickle.BUILD[0]] = _build
    dispatch[pickle.SETITEMS[0]] = _set_items
    dispatch[pickle.SETITEM[0]] = _set_item


def _check_key(key: object) -> None:
    parts = (key.fqn, key.offset) if isinstance(key, metadata.MetadataIndex) else (key,)
    if not all(isinstance(part, str | int | torch.Size | None) for part in parts):
        raise pickle.UnpicklingError(f"a dictionary key of type {type(key).__name__}")


def read_index(path: Path) -> metadata.Metadata:
    """The index of a PyTorch distributed checkpoint, its `.metadata` file.

    Raises:
        ValueError: if the pickle names anything but the classes of torch.distributed.checkpoint.
        Exception: of any type, if the file is damaged.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path.name}")
    try:
        index = _IndexUnpickler(io.BytesIO(path.read_bytes())).load()
    except RefusedNameError as refused:
        raise _refused(path, str(refused)) from refused
    if not isinstance(index, metadata.Metadata):
        raise TypeError(f"it contains a {type(index).__name__} instead of an index")
    return index


def _refused(path: Path, name: str) -> ValueError:
    return input_error(
        f"{path} was not read: it names {name[:80]!r}, which no checkpoint needs and which may run "
        "a program. It may name only the classes of a Megatron checkpoint. Use a checkpoint from a "
        "source that you trust."
    )


class _Opaque:
    """Takes the place of an object in a checkpoint that the converter does not use."""

    def __init__(self, *args: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


# What Megatron's own loader allows (megatron/core/safe_globals.py), by name: nothing is imported.
_OPAQUE_NAMES = (
    "_io.BytesIO",
    "io.BytesIO",
    "megatron.core.enums.ModelType",
    "megatron.core.optimizer.optimizer_config.OptimizerConfig",
    "megatron.core.rerun_state_machine.RerunDiagnostic",
    "megatron.core.rerun_state_machine.RerunMode",
    "megatron.core.rerun_state_machine.RerunState",
    "megatron.core.transformer.enums.AttnBackend",
    "megatron.core.transformer.enums.CudaGraphModule",
    "megatron.core.transformer.enums.CudaGraphScope",
    "megatron.core.transformer.enums.InferenceCudaGraphScope",
    "numpy._core.multiarray._reconstruct",
    "numpy.core.multiarray._reconstruct",
    "numpy.dtype",
    "numpy.dtypes.UInt32DType",
    "numpy.ndarray",
    "pathlib.PosixPath",
    "pathlib._local.PosixPath",
    "signal.Signals",
    "torch._C.Generator",
    "types.SimpleNamespace",
)
_ARGS_GLOBALS: list[Any] = [Namespace, *((_Opaque, name) for name in _OPAQUE_NAMES)]


class FileSlice(io.RawIOBase):
    """Part of a file as a file of its own.

    Args:
        path: of the file.
        start: first byte.
        length: number of bytes.
    """

    def __init__(self, path: Path, start: int, length: int) -> None:
        self.path = path
        self.length = length
        self._file = path.open("rb")
        self._start = start
        self._position = 0

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def seek(self, offset: int, start: int = io.SEEK_SET) -> int:
        """Move within the part; positions beyond its end read nothing."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.length}[start]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Read as many bytes as fit and are left; returns their number."""
        room = memoryview(buffer).cast("B")[: max(0, self.length - self._position)]
        self._file.seek(self._start + self._position)
        count = self._file.readinto(room)
        self._position += count
        return count

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        super().close()


def load_archive(file: FileSlice) -> Any:
    """What `torch.save` wrote: tensors, plain data, and a Namespace.

    Raises:
        ValueError: if the archive names another class.
        Exception: of any type, if the file is damaged.
    """
    with zipfile.ZipFile(file) as archive:
        records = archive.infolist()
    if any(record.compress_type != zipfile.ZIP_STORED for record in records):
        raise ValueError("the archive is compressed, as torch.save never does")
    if sum(record.file_size for record in records) > file.length:
        raise ValueError("the archive claims to hold more than its own size")
    stream = cast(IO[bytes], file)
    # The context removes all that it is given, also what Megatron allowed before.
    allowed = torch.serialization.get_safe_globals()
    with torch.serialization.safe_globals([each for each in _ARGS_GLOBALS if each not in allowed]):
        stream.seek(0)
        if unknown := torch.serialization.get_unsafe_globals_in_checkpoint(stream):
            raise _refused(file.path, unknown[0])
        stream.seek(0)
        return torch.load(stream, map_location="cpu", weights_only=True)
