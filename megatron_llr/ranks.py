"""Agreement between ranks: an error on one is the same error on all, and none of them hangs."""

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist

from megatron_llr.errors import topology_error


def gather_objects(value: Any) -> list[Any]:
    """The value of every rank of the job, in rank order. Enter on all ranks."""
    if not dist.is_initialized():
        return [value]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def gather_distinct(value: Any) -> list[Any]:
    """The value of every rank of the job, in rank order; equal ones travel and are kept once.

    For long lists that many ranks share, replicas above all. Enter on all ranks.

    Args:
        value: plain JSON values; tuples arrive as lists.

    Returns:
        One value per rank; ranks that brought the same get the same object.
    """
    text = json.dumps(value)
    digests = gather_objects(hashlib.sha256(text.encode()).hexdigest())
    found: dict[str, Any] = {}
    for rank, digest in enumerate(digests):
        if digest not in found:
            box = [text]
            if len(digests) > 1:
                dist.broadcast_object_list(box, src=rank)
            found[digest] = json.loads(box[0])
    return [found[digest] for digest in digests]


def together[Result](step: Callable[[], Result]) -> Result:
    """Run a step that may fail on some ranks; if it does on any, raise on all.

    Enter on all ranks; the step itself must hold no collective.

    Raises:
        ValueError | RuntimeError: the first failing rank's error, with its rank.
    """
    error: Exception | None = None
    result: list[Result] = []
    try:
        result.append(step())
    except Exception as caught:  # every failure has to reach the other ranks before it is raised
        error = caught
    raise_together(error)
    return result[0]


def raise_together(error: Exception | None) -> None:
    """Raise on every rank if any rank brings an error. Enter on all ranks.

    Raises:
        ValueError: if the first error is one; RuntimeError otherwise. The text names the rank where
            it is not the same everywhere.
    """
    told = gather_objects(None if error is None else (isinstance(error, ValueError), str(error)))
    failures = [(rank, report) for rank, report in enumerate(told) if report is not None]
    if not failures:
        return
    rank, (is_user_error, text) = failures[0]
    everywhere = len(set(told)) == 1
    where = "" if everywhere else f" (rank {rank})"
    raise (ValueError if is_user_error else RuntimeError)(f"{text}{where}") from error


def require_equal(values: dict[str, Any], remedy: Callable[[str], str]) -> None:
    """Check that all ranks were given the same settings. Enter on all ranks.

    Args:
        values: setting -> value on this rank.
        remedy: setting -> what mends a difference.

    Raises:
        RuntimeError: naming the first setting that differs, with its values.
    """
    # Where all agree, as they should, only a digest travels.
    if len(set(gather_objects(hashlib.sha256(repr(values).encode()).hexdigest()))) == 1:
        return
    by_rank: Sequence[dict[str, Any]] = gather_objects(values)
    for setting in values:
        seen = [other.get(setting) for other in by_rank]
        for rank, value in enumerate(seen):
            if value != seen[0]:
                raise topology_error(
                    f"{setting} differs between ranks",
                    got=f"{seen[0]!r} on rank 0, {value!r} on rank {rank}",
                    allowed="one value for the whole job",
                    remedy=remedy(setting),
                )
