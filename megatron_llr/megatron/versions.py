"""The versions of Megatron-Core that this package supports."""

from importlib import metadata

from packaging.version import Version

from megatron_llr.errors import input_error

# The training loop, the optimizer wrappers and the checkpoint layout were tested on these.
SUPPORTED = (Version("0.19"), Version("0.20"))


def check_version() -> None:
    """Refuse a megatron-core outside the supported range.

    Raises:
        ValueError: naming the installed version and the versions allowed.
    """
    try:
        installed = metadata.version("megatron-core")
    except metadata.PackageNotFoundError:
        installed = "none"
    if (
        installed == "none"
        or not SUPPORTED[0] <= Version(Version(installed).base_version) < SUPPORTED[1]
    ):
        supported = f">={SUPPORTED[0]},<{SUPPORTED[1]}"
        raise input_error(
            f"The installed megatron-core ({installed}) is not supported. It must be {supported}. "
            f"Run pip install 'megatron-core{supported}' with Python 3.12 or newer."
        )


def versions() -> dict[str, str]:
    """Versions that must be the same on every node, like that of torch."""
    return {"the version of megatron-core": metadata.version("megatron-core")}
