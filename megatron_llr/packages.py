"""Optional packages: what is there, and what is there by half. Imports none of them."""

from importlib.util import find_spec

from megatron_llr.errors import user_error


def check_transformer_engine() -> None:
    """Refuse a Transformer Engine of which only a part is installed.

    Its Python package without its torch library makes megatron's import fail with an error that
    names neither.

    Raises:
        ValueError: naming the part that is missing.
    """
    if find_spec("transformer_engine") is None or find_spec("transformer_engine_torch") is not None:
        return
    raise user_error(
        "Transformer Engine is installed by half",
        got="the package transformer_engine without its torch library, transformer_engine_torch",
        allowed="both, or neither",
        remedy="pip install --no-build-isolation 'transformer-engine[pytorch]', or pip uninstall "
        "transformer-engine transformer-engine-cu12 transformer-engine-cu13",
    )
