"""Output that is complete or absent: written under a temporary name, then renamed."""

import contextlib
import csv
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from megatron_llr.errors import input_error


def refuse_existing(target: Path) -> None:
    """Refuse to overwrite.

    Raises:
        ValueError: if the target exists.
    """
    if target.exists():
        raise input_error(
            f"The output {target} already exists. It must be a new path: choose another name or "
            "remove it."
        )


def require_space(folder: Path, size: int) -> None:
    """Refuse to start writing an output that does not fit on the disk.

    Raises:
        ValueError: if the disk of the folder has fewer than `size` bytes free.
    """
    free = shutil.disk_usage(folder).free
    if free < size:
        raise input_error(
            f"Not enough disk space for {folder}: {free / 1e9:.2f} GB free, but the output needs "
            f"at least {size / 1e9:.2f} GB. Free some space or choose another disk."
        )


def cannot_write(folder: Path, cause: BaseException) -> ValueError:
    """The error of a write that failed midway: a full disk, a quota, a lost mount."""
    return input_error(
        f"Cannot write in {folder}: {type(cause).__name__}: {cause}. The disk must have space for "
        "the whole output, without a limit on file size. The partial output was removed. Free "
        "some space or choose another disk."
    )


def and_more(names: Sequence[str], shown: int = 1) -> str:
    """The first names, and how many more there are: `a, b and 3 more`."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


@contextlib.contextmanager
def replaced_file(path: Path) -> Iterator[Path]:
    """A temporary path in the same folder, renamed to `path` when the block succeeds.

    If the block fails, the temporary file is removed and an existing `path` stays unchanged.
    """
    partial = path.with_name(f"{path.stem}.part{path.suffix}")
    try:
        yield partial
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    os.replace(partial, path)


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write a CSV file that is complete or absent.

    Args:
        path: the file; an existing one is replaced.
        header: names of the columns.
        rows: cells, None for an empty one.
    """
    with replaced_file(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)


@contextlib.contextmanager
def staged_folder(target: Path) -> Iterator[Path]:
    """A temporary folder, renamed to `target` when the block succeeds and removed when it fails.

    A process that is killed with SIGKILL leaves it as `.NAME.partial-...`.

    Raises:
        ValueError: if the target exists.
    """
    refuse_existing(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
    try:
        # mkdtemp makes folders that only their owner can read.
        partial.chmod(0o755)
        yield partial
        refuse_existing(target)
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
