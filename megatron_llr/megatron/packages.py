"""Checks of optional packages, without importing them."""

from importlib.util import find_spec
from pathlib import Path

from megatron_llr.errors import input_error


def check_transformer_engine() -> None:
    """Refuse a Transformer Engine that is only partially installed.

    With its Python package but without its torch library, megatron's import fails with an error
    that names neither.

    Raises:
        ValueError: naming the part that is missing.
    """
    package = find_spec("transformer_engine")
    if package is None or _has_torch_library(package.origin):
        return
    raise input_error(
        "Transformer Engine is only partially installed: the package transformer_engine without "
        "its torch library, transformer_engine_torch. Install both (pip install "
        "--no-build-isolation 'transformer-engine[pytorch]') or neither (pip uninstall "
        "transformer-engine transformer-engine-cu12 transformer-engine-cu13)."
    )


def _has_torch_library(origin: str | None) -> bool:
    """Whether the library is a module of its own, or in a folder that the package searches.

    The three folders are those of transformer_engine/common/__init__.py: for an editable install,
    an install from source, and the wheels.
    """
    if find_spec("transformer_engine_torch") is not None:
        return True
    if origin is None:
        return False
    package = Path(origin).parent
    folders = (package.parent, package, package / "wheel_lib")
    return any(any(folder.glob("transformer_engine_torch*.so")) for folder in folders)
