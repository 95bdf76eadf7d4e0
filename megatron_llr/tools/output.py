"""Output that is either whole or not there: written beside, then renamed."""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from megatron_llr.errors import user_error


def refuse_existing(target: Path, remedy: str = "choose another name, or remove it") -> None:
    """Refuse to write where something is already.

    Raises:
        ValueError: if the target exists.
    """
    if target.exists():
        raise user_error(
            "the output exists already", got=target, allowed="a new path", remedy=remedy
        )


def require_space(folder: Path, size: int) -> None:
    """Refuse to begin what cannot end.

    Raises:
        ValueError: if the disk of the folder has fewer than `size` bytes free.
    """
    free = shutil.disk_usage(folder).free
    if free < size:
        raise user_error(
            f"not enough room in {folder}",
            got=f"{free / 1e9:.2f} GB free",
            allowed=f"at least {size / 1e9:.2f} GB",
            remedy="free some, or choose another disk",
        )


def cannot_write(folder: Path, cause: BaseException) -> ValueError:
    """The error of a write that failed half-way: a full disk, a quota, a lost mount."""
    return user_error(
        f"cannot write in {folder}",
        got=f"{type(cause).__name__}: {cause}",
        allowed="a disk with room for the whole output, and no limit on the size of files",
        remedy="nothing was left there; free some room, or choose another disk",
    )


@contextlib.contextmanager
def staged_folder(target: Path) -> Iterator[Path]:
    """A folder to write in, which becomes `target` at the end and vanishes on any failure.

    A process that is killed leaves it behind under its own name, `.NAME.partial-…`.

    Raises:
        ValueError: if the target exists.
    """
    refuse_existing(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
    try:
        # mkdtemp's folders are for their owner alone.
        partial.chmod(0o755)
        yield partial
        refuse_existing(target)
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
