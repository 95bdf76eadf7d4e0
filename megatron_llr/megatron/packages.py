"""Optional packages: what is there, and what is there by half. Imports none of them."""

from importlib.util import find_spec
from pathlib import Path

from megatron_llr.errors import user_error


def check_transformer_engine() -> None:
    """Refuse a Transformer Engine of which only a part is installed.

    Its Python package without its torch library makes megatron's import fail with an error that
    names neither.

    Raises:
        ValueError: naming the part that is missing.
    """
    found = find_spec("transformer_engine")
    if found is None or _has_torch_library(found.origin):
        return
    raise user_error(
        "Transformer Engine is installed by half",
        got="the package transformer_engine without its torch library, transformer_engine_torch",
        allowed="both, or neither",
        remedy="pip install --no-build-isolation 'transformer-engine[pytorch]', or pip uninstall "
        "transformer-engine transformer-engine-cu12 transformer-engine-cu13",
    )


def _has_torch_library(origin: str | None) -> bool:
    """Whether the library is a module by itself, or lies in a folder that the package searches.

    Those are the three of transformer_engine/common/__init__.py: of an editable install, of one
    from source, of the wheels.
    """
    if find_spec("transformer_engine_torch") is not None:
        return True
    if origin is None:
        return False
    package = Path(origin).parent
    folders = (package.parent, package, package / "wheel_lib")
    return any(any(folder.glob("transformer_engine_torch*.so")) for folder in folders)
