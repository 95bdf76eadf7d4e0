"""Eigenvalues of a stack of symmetric matrices by `cusolverDnXsyevBatched`, for torch below 2.12.

From 2.12 on `torch.linalg.eigvalsh` calls that function itself. Older versions solve the matrices
of a stack one after the other, which takes 2 to 6 times as long at 768 to 2560 eigenvalues (H200).
This module calls the cuSOLVER library that torch has loaded through ctypes.
"""

import ctypes
import logging
import re
from functools import cache
from pathlib import Path

import torch

from megatron_llr.errors import first_line

logger = logging.getLogger(__name__)

# cusolverDnXsyevBatched was added in cuSOLVER 11.7.1. cusolverGetVersion returns
# 1000 * major + 100 * minor + patch.
_LEAST_VERSION = 11_701
# Values of the enumerations cusolverEigMode_t, cublasFillMode_t, cudaDataType and cusolverStatus_t.
_NO_VECTORS, _LOWER = 0, 0
_DATA_TYPES = {torch.float32: 0, torch.float64: 1}
_SUCCESS, _ALLOC_FAILED = 0, 2

_INT, _LONG, _SIZE, _POINTER = ctypes.c_int, ctypes.c_int64, ctypes.c_size_t, ctypes.c_void_p
_SIZES = ctypes.POINTER(_SIZE)
# The first arguments of the two functions, up to the data type of the computation, are the same.
_MATRICES = [_POINTER, _POINTER, _INT, _INT, _LONG, _INT, _POINTER, _LONG, _INT, _POINTER, _INT]
_SIGNATURES = {
    "cusolverGetVersion": [ctypes.POINTER(_INT)],
    "cusolverDnCreate": [ctypes.POINTER(_POINTER)],
    "cusolverDnCreateParams": [ctypes.POINTER(_POINTER)],
    "cusolverDnSetStream": [_POINTER, _POINTER],
    "cusolverDnXsyevBatched_bufferSize": [*_MATRICES, _SIZES, _SIZES, _LONG],
    "cusolverDnXsyevBatched": [*_MATRICES, _POINTER, _SIZE, _POINTER, _SIZE, _POINTER, _LONG],
}


class CuSolverError(RuntimeError):
    """A function of cuSOLVER returned an error status."""


class _Broken:
    """Set after a failed call: the library is not called again in this process."""

    reason = ""


@cache
def cusolver_library() -> ctypes.CDLL | None:
    """The cuSOLVER library that torch has loaded, or None if there is none that is new enough."""
    if not torch.cuda.is_available() or torch.version.hip:
        return None
    # Some builds of torch load the library only at the first decomposition.
    torch.linalg.eigvalsh(torch.eye(2, device="cuda"))
    maps = Path("/proc/self/maps")
    path = re.search(r"\S*/libcusolver\.so\S*", maps.read_text()) if maps.exists() else None
    return bind(path[0]) if path else None


def bind(path: str) -> ctypes.CDLL | None:
    """Load a cuSOLVER library and declare the functions used here; None if one is missing."""
    try:
        loaded = ctypes.CDLL(path)
        for name, arguments in _SIGNATURES.items():
            function = getattr(loaded, name)
            function.argtypes, function.restype = arguments, _INT
    except (OSError, AttributeError):
        return None
    return loaded if library_version(loaded) >= _LEAST_VERSION else None


def library_version(loaded: ctypes.CDLL) -> int:
    """Version of a cuSOLVER library: 12004 is 12.0.4; 0 if unknown."""
    number = _INT(0)
    return number.value if loaded.cusolverGetVersion(ctypes.byref(number)) == _SUCCESS else 0


def torch_solves_batches() -> bool:
    """Whether `torch.linalg.eigvalsh` itself calls the batched solver: from 2.12 on."""
    major, minor = (int(part) for part in torch.__version__.split(".")[:2])
    return (major, minor) >= (2, 12)


def is_wanted(gram: torch.Tensor) -> bool:
    """Whether `eigvalsh_batched` is to solve this stack."""
    return (
        gram.is_cuda
        and not torch_solves_batches()
        and not _Broken.reason
        and gram.dtype in _DATA_TYPES
        and cusolver_library() is not None
    )


def _call(loaded: ctypes.CDLL, name: str, *arguments: object) -> None:
    status = getattr(loaded, name)(*arguments)
    if status == _ALLOC_FAILED:
        raise torch.OutOfMemoryError(f"CUDA out of memory: {name} could not allocate")
    if status != _SUCCESS:
        raise CuSolverError(f"{name} returned status {status}")


# The latest host workspace of each GPU. The solver may still use it after its call has returned.
_host_workspaces: dict[int, torch.Tensor] = {}


@cache
def _context(device: int) -> tuple[ctypes.c_void_p, ctypes.c_void_p]:
    """Handle and parameters for one GPU, created once, since a handle allocates memory."""
    loaded = cusolver_library()
    assert loaded is not None
    handle, parameters = _POINTER(), _POINTER()
    with torch.cuda.device(device):
        _call(loaded, "cusolverDnCreate", ctypes.byref(handle))
        _call(loaded, "cusolverDnCreateParams", ctypes.byref(parameters))
    return handle, parameters


def eigvalsh_batched(gram: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvalues of a stack of symmetric matrices; no synchronization with the device.

    Read the result before the next call on the same GPU, which frees the host workspace that the
    solver may still use.

    Args:
        gram: [B, N, N] fp32 or fp64, contiguous, on a GPU; N * N * B at most 2^31 - 1. Overwritten.

    Returns:
        [B, N] eigenvalues, ascending, in the dtype of `gram`; and [B] int32, 0 where the solver
        converged.

    Raises:
        OutOfMemoryError: if the workspace cannot be allocated.
        CuSolverError: if the library returns another error status.
    """
    loaded = cusolver_library()
    if loaded is None or not gram.is_contiguous() or gram.numel() > 2**31 - 1:
        raise CuSolverError("cusolverDnXsyevBatched cannot solve this stack")
    count, size = gram.shape[:2]
    kind, device = _DATA_TYPES[gram.dtype], gram.device
    handle, parameters = _context(device.index)
    values = gram.new_empty(count, size)
    info = torch.zeros(count, dtype=torch.int32, device=device)
    # A symmetric matrix is the same in column-major and in row-major order.
    matrices = (handle, parameters, _NO_VECTORS, _LOWER, size, kind, gram.data_ptr(), size, kind)
    matrices = (*matrices, values.data_ptr(), kind)  # type: ignore[assignment]
    on_device, on_host = _SIZE(0), _SIZE(0)
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream(device).cuda_stream
        _call(loaded, "cusolverDnSetStream", handle, stream)
        sizes = (ctypes.byref(on_device), ctypes.byref(on_host), count)
        _call(loaded, "cusolverDnXsyevBatched_bufferSize", *matrices, *sizes)
        # Torch's allocator reuses this memory in stream order, so the reference may be dropped
        # while the solver runs.
        workspace = torch.empty(max(on_device.value, 1), dtype=torch.uint8, device=device)
        host = torch.empty(max(on_host.value, 1), dtype=torch.uint8, device="cpu")
        buffers = (workspace.data_ptr(), on_device.value, host.data_ptr(), on_host.value)
        _call(loaded, "cusolverDnXsyevBatched", *matrices, *buffers, info.data_ptr(), count)
        _host_workspaces[device.index] = host
    return values, info


def give_up(error: CuSolverError) -> None:
    """Use torch's solver from now on in this process, and log one warning."""
    _Broken.reason = first_line(error)
    logger.warning(
        "megatron_llr: %s; torch's solver is used instead, which solves matrices one by one",
        _Broken.reason,
    )
