"""Where each rank of a job is, and which ranks hold up the others."""

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from types import FrameType

import torch

from megatron_llr.tools.self_test.results import spelled

_TORCH = os.path.dirname(torch.__file__) + os.sep
_WRAPPERS = (_TORCH, contextlib.__file__)
_DISTRIBUTED = os.path.join(_TORCH, "distributed") + os.sep


@dataclass(frozen=True)
class Position:
    """Where a rank is.

    Attributes:
        rank: its number.
        host: name of its machine.
        beat: count of publications, one a second.
        marks: count of steps that it has entered.
        step: the last one, in words.
        code: the line that its main thread executes, outside torch.
        waits: whether that line calls torch.distributed.
        error: of a rank whose step failed.
    """

    rank: int
    host: str
    beat: int
    marks: int
    step: str
    code: str
    waits: bool
    error: str = ""


def code_position(frame: FrameType | None) -> tuple[str, bool]:
    """The innermost line outside torch, `function (file:line)`; whether it calls a collective."""
    waits = frame is not None and frame.f_code.co_filename.startswith(_DISTRIBUTED)
    while (
        frame is not None
        and frame.f_back is not None
        and frame.f_code.co_filename.startswith(_WRAPPERS)
    ):
        frame = frame.f_back
    if frame is None:
        return "", waits
    short = "/".join(frame.f_code.co_filename.split(os.sep)[-3:])
    return f"{frame.f_code.co_name} ({short}:{frame.f_lineno})", waits


def responsible(
    before: Sequence[Position | None], after: Sequence[Position | None]
) -> tuple[list[int], str]:
    """The ranks that hold up the others, and why.

    Args:
        before: position of every rank; None where it has published none.
        after: the same some seconds later.

    Returns:
        The ranks of the first kind that there is: failed, not started, not running, steps behind,
        outside a collective while others are in one, at another line than most. All ranks if all
        are at one line.
    """
    here = [position for position in after if position is not None]
    failed = [position for position in here if position.error]
    if failed:
        return [position.rank for position in failed], f"failed: {failed[0].error}"
    absent = [rank for rank, position in enumerate(after) if position is None]
    if absent:
        return absent, "did not start"
    beats = {position.rank: position.beat for position in before if position is not None}
    silent = [p.rank for p in here if beats.get(p.rank) == p.beat]
    if silent:
        return silent, "does not run: its process is stopped, or its machine or network is down"
    late = "did not arrive where the other ranks wait"
    behind = [p.rank for p in here if p.marks < max(each.marks for each in here)]
    if behind:
        return behind, late
    outside = [position.rank for position in here if not position.waits]
    if 0 < len(outside) < len(here):
        return outside, late
    lines: dict[str, list[int]] = {}
    for position in here:
        lines.setdefault(position.code, []).append(position.rank)
    sizes = sorted(len(ranks) for ranks in lines.values())
    if len(lines) > 1 and sizes[-1] > sizes[-2]:
        return [r for ranks in lines.values() if len(ranks) < sizes[-1] for r in ranks], late
    return [p.rank for p in here], "wait for each other: a GPU or the network does not answer"


def hang_message(
    ranks: Sequence[int], reason: str, positions: Sequence[Position | None], limit: float
) -> str:
    """The text of a stopped job: which ranks, why and in which step; where every rank is."""
    at = [position for position in positions if position is not None and position.rank in ranks]
    hosts = sorted({position.host for position in at})
    on = f" on {', '.join(hosts)}" if hosts else ""
    where = f" (in {at[0].step})" if at else ""
    lines = [f"{spelled(ranks)}{on} {reason}{where}"]
    if not any(position.error for position in at):
        lines[0] += f"; no progress within {limit:.0f} s (--timeout)"
    places: dict[tuple[str, str], list[int]] = {}
    for position in positions:
        if position is not None:
            places.setdefault((position.step, position.code), []).append(position.rank)
    for (step, code), members in places.items():
        lines.append(f"  {spelled(members)}: {step}, {code}")
    return "\n".join(lines)
