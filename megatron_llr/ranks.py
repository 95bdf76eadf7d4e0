"""Agreement between ranks: an error on one rank is raised on all, and none of them hangs."""

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist

from megatron_llr.errors import first_line, topology_error
from megatron_llr.output import and_more

# Values and ranks that an error lists.
_LISTED = 4
_AGREEMENT = "an agreement of all ranks"


@contextlib.contextmanager
def exchange(purpose: str) -> Iterator[None]:
    """Name the purpose of a collective that fails because another rank died or hangs.

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
            remedy="look for the first error of the other ranks: one of them died or hangs",
        ) from broken


def gather_objects(value: Any) -> list[Any]:
    """The value of every rank of the job, in rank order. Enter on all ranks.

    Raises:
        RuntimeError: if another rank died or does not take part.
    """
    if not dist.is_initialized():
        return [value]
    gathered: list[Any] = [None] * dist.get_world_size()
    with exchange(_AGREEMENT):
        dist.all_gather_object(gathered, value)
    return gathered


def gather_distinct(value: Any) -> list[Any]:
    """The value of every rank of the job, in rank order; equal ones are sent and kept once.

    For long lists that many ranks share, such as data-parallel replicas. Enter on all ranks.

    Args:
        value: plain JSON values; tuples arrive as lists.

    Returns:
        One value per rank; equal values are the same object.
    """
    text = json.dumps(value)
    digests = gather_objects(hashlib.sha256(text.encode()).hexdigest())
    by_digest: dict[str, Any] = {}
    for rank, digest in enumerate(digests):
        if digest not in by_digest:
            box = [text]
            if len(digests) > 1:
                with exchange(_AGREEMENT):
                    dist.broadcast_object_list(box, src=rank)
            by_digest[digest] = json.loads(box[0])
    return [by_digest[digest] for digest in digests]


def together[Result](step: Callable[[], Result]) -> Result:
    """Run a step that may fail on some ranks; if it does on any, raise on all.

    Enter on all ranks; the step itself must not run a collective.

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
    """Raise on every rank if any rank has an error. Enter on all ranks.

    Raises:
        ValueError: if the first error is one; RuntimeError otherwise. The text names the rank
            unless all ranks have the same error.
    """
    reports = gather_objects(None if error is None else (isinstance(error, ValueError), str(error)))
    failures = [(rank, report) for rank, report in enumerate(reports) if report is not None]
    if not failures:
        return
    rank, (is_user_error, text) = failures[0]
    everywhere = len(set(reports)) == 1
    where = "" if everywhere else f" (rank {rank})"
    raise (ValueError if is_user_error else RuntimeError)(f"{text}{where}") from error


def require_equal(values: Mapping[str, Any], remedy: Callable[[str], str]) -> None:
    """Check that all ranks were given the same settings. Enter on all ranks.

    Args:
        values: setting -> value on this rank; two values are equal if their `repr` is.
        remedy: setting -> instruction that fixes a difference.

    Raises:
        RuntimeError: naming the first setting that differs, its values with their ranks, and the
            other settings that differ.
    """
    # In the usual case that all agree, only a digest is sent.
    if len(set(gather_objects(hashlib.sha256(repr(values).encode()).hexdigest()))) == 1:
        return
    by_rank = gather_objects({setting: repr(value) for setting, value in values.items()})
    # In the order of rank 0; other ranks may have settings that it lacks.
    every_setting = dict.fromkeys(setting for given in by_rank for setting in given)
    differing = [
        setting
        for setting in every_setting
        if any(given.get(setting) != by_rank[0].get(setting) for given in by_rank)
    ]
    if differing:
        first, *others = differing
        ranks_with: dict[str, list[str]] = {}
        for rank, given in enumerate(by_rank):
            ranks_with.setdefault(given.get(first, "nothing"), []).append(str(rank))
        listed = [
            f"{value} on rank{'s' if len(ranks) > 1 else ''} {and_more(ranks, _LISTED)}"
            for value, ranks in ranks_with.items()
        ]
        also = f" (also different: {', '.join(others)})" if others else ""
        raise topology_error(
            f"{first} differs between ranks",
            got=and_more(listed, _LISTED) + also,
            allowed="one value for the whole job",
            remedy=remedy(first),
        )
