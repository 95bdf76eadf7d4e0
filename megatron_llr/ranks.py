"""Agreement between ranks: an error on one is the same error on all, and none of them hangs."""

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from megatron_llr.errors import first_line, topology_error

# Values and ranks that an error spells out.
_SPELT = 4
_AGREEMENT = "an agreement of all ranks"


@contextlib.contextmanager
def exchange(purpose: str) -> Iterator[None]:
    """Say what was going on where a collective inside fails: another rank died or stands still.

    Raises:
        RuntimeError: naming the purpose, with the backend's error.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as broken:
        raise topology_error(
            f"the exchange between ranks broke off during {purpose}",
            got=f"{type(broken).__name__}: {first_line(broken)} (rank {dist.get_rank()})",
            allowed="every rank takes part, within --distributed-timeout-minutes",
            remedy="look for the first error of the other ranks: one of them died or stood still",
        ) from broken


def gather_objects(value: Any) -> list[Any]:
    """The value of every rank of the job, in rank order. Enter on all ranks.

    Raises:
        RuntimeError: if another rank died or does not come.
    """
    if not dist.is_initialized():
        return [value]
    gathered: list[Any] = [None] * dist.get_world_size()
    with exchange(_AGREEMENT):
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
                with exchange(_AGREEMENT):
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


def require_equal(values: Mapping[str, Any], remedy: Callable[[str], str]) -> None:
    """Check that all ranks were given the same settings. Enter on all ranks.

    Args:
        values: setting -> value on this rank.
        remedy: setting -> what mends a difference.

    Raises:
        RuntimeError: naming the first setting that differs, its values with their ranks, and the
            other settings that differ.
    """
    # Where all agree, as they should, only a digest travels.
    if len(set(gather_objects(hashlib.sha256(repr(values).encode()).hexdigest()))) == 1:
        return
    by_rank: Sequence[Mapping[str, Any]] = gather_objects(dict(values))
    # In the order of rank 0, whose settings others may lack.
    known = dict.fromkeys(setting for given in by_rank for setting in given)
    differing = [
        setting
        for setting in known
        if any(given.get(setting) != by_rank[0].get(setting) for given in by_rank)
    ]
    if differing:
        first, *others = differing
        also = f"; also {', '.join(others)}" if others else ""
        raise topology_error(
            f"{first} differs between ranks",
            got=_by_value([given.get(first) for given in by_rank]) + also,
            allowed="one value for the whole job",
            remedy=remedy(first),
        )


def _by_value(seen: Sequence[Any]) -> str:
    """`100 on rank 0, 50 on ranks 1, 3`, from the value of every rank."""
    ranks: list[tuple[Any, list[int]]] = []
    for rank, value in enumerate(seen):
        known = next((listed for other, listed in ranks if other == value), None)
        if known is None:
            ranks.append((value, [rank]))
        else:
            known.append(rank)
    parts = [f"{value!r} on {_some_ranks(listed)}" for value, listed in ranks[:_SPELT]]
    more = [f"{len(ranks) - _SPELT} other values"] if len(ranks) > _SPELT else []
    return ", ".join([*parts, *more])


def _some_ranks(ranks: Sequence[int]) -> str:
    listed = ", ".join(str(rank) for rank in ranks[:_SPELT])
    more = f" and {len(ranks) - _SPELT} more" if len(ranks) > _SPELT else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {listed}{more}"
