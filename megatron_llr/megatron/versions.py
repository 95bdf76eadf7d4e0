"""The versions of Megatron-Core that this package supports."""

from importlib import metadata

from packaging.version import Version

from megatron_llr.errors import user_error

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
        raise user_error(
            "unsupported megatron-core",
            got=installed,
            allowed=f">={SUPPORTED[0]},<{SUPPORTED[1]}",
            remedy="pip install 'megatron-core>=0.19,<0.20' under Python 3.12 or newer",
        )


def versions() -> dict[str, str]:
    """What must be the same on every node, beside torch."""
    return {"the version of megatron-core": metadata.version("megatron-core")}
