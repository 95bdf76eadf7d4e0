"""Index algebra between Megatron's fused, sharded parameters and logical matrices.

Pure integers: no torch, no megatron. Rows are counted in three ways: in the parameter as one rank
holds it (`local`), in the fused parameter over all tensor-parallel ranks, and in the logical matrix
(`logical`).
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Span:
    """A run of rows of one logical matrix inside a parameter.

    Attributes:
        local: first row in the parameter held by the rank.
        logical: first row in the logical matrix.
        count: number of rows.
    """

    local: int
    logical: int
    count: int


Spans = dict[str, tuple[Span, ...]]
"""Role -> runs of its rows, ascending; joined where they touch."""


@dataclass(frozen=True, slots=True)
class Placement:
    """The part of a logical matrix that one rank holds: runs of rows, and a range of columns."""

    spans: tuple[Span, ...]
    first_column: int
    columns: int

    @property
    def rows(self) -> int:
        """Number of rows held."""
        return sum(span.count for span in self.spans)

    @property
    def numel(self) -> int:
        """Number of elements held."""
        return self.rows * self.columns


def _join(spans: Iterable[Span]) -> tuple[Span, ...]:
    joined: list[Span] = []
    for span in spans:
        last = joined[-1] if joined else None
        touches = (
            last is not None
            and last.local + last.count == span.local
            and last.logical + last.count == span.logical
        )
        if touches:
            assert last is not None
            joined[-1] = Span(last.local, last.logical, last.count + span.count)
        else:
            joined.append(span)
    return tuple(joined)


def interleaved(parts: Sequence[tuple[str, int]], periods: int, first: int, count: int) -> Spans:
    """Rows of each role in a window of a parameter that repeats `parts`, period after period.

    Megatron's `linear_qkv` is one period per query group, `[q ... q | k | v]`
    (megatron/core/transformer/attention.py); a tensor-parallel rank holds a window of it, which may
    cut a group where there are fewer groups than ranks.

    Args:
        parts: (role, rows) of one period, in order.
        periods: number of periods.
        first: first row of the window, in the whole fused parameter.
        count: rows of the window.
    """
    spans: dict[str, list[Span]] = defaultdict(list)
    seen: dict[str, int] = defaultdict(int)
    row, stop = 0, first + count
    for _ in range(periods):
        for role, rows in parts:
            begin, end = max(row, first), min(row + rows, stop)
            if begin < end:
                spans[role].append(Span(begin - first, seen[role] + begin - row, end - begin))
            row += rows
            seen[role] += rows
    return {role: _join(runs) for role, runs in spans.items()}


def stacked(roles: Sequence[str], rows: int, shard: int) -> Spans:
    """Rows of each role where every rank holds an equal piece of each, one after the other.

    Megatron's gated `linear_fc1` is `[gate piece; up piece]` on every rank
    (megatron/core/transformer/mlp.py).

    Args:
        roles: in the order in which a rank stacks them.
        rows: rows of the parameter held by one rank.
        shard: position of the rank among those that share the parameter.
    """
    piece, rest = divmod(rows, len(roles))
    assert rest == 0, (roles, rows)
    return {role: (Span(index * piece, shard * piece, piece),) for index, role in enumerate(roles)}


def sectioned(sections: Sequence[int], shard: int, shards: int) -> tuple[Span, ...]:
    """Rows of one role where every rank holds an equal piece of each of its sections.

    Megatron's Mamba `in_proj` is `[z; x; B; C; dt]` on every rank
    (megatron/core/ssm/mamba_mixer.py); the logical matrix has the whole z first, then the whole x.

    Args:
        sections: rows of the piece of each section that a rank holds, in order.
        shard: position of the rank among those that share the parameter.
        shards: number of those.
    """
    spans: list[Span] = []
    local = 0
    for rows in sections:
        spans.append(Span(local, local * shards + shard * rows, rows))
        local += rows
    return _join(spans)


def flat_ranges(
    spans: Sequence[Span], columns: int, start: int, stop: int
) -> tuple[tuple[int, int], ...]:
    """Where runs of rows lie in a slice of the flattened parameter.

    Args:
        spans: runs of rows in the parameter.
        columns: columns of the parameter.
        start: first element of the slice, in the flattened parameter.
        stop: one past its last element. The slice may cut a row.

    Returns:
        (first, one past last) of every run, counted from `start`; touching runs joined.
    """
    cut = (
        (
            max(span.local * columns, start) - start,
            min((span.local + span.count) * columns, stop) - start,
        )
        for span in spans
    )
    return join_ranges((first, last) for first, last in cut if first < last)


def join_ranges(ranges: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """The same ranges (first, one past last), ascending; those that touch are one."""
    joined: list[tuple[int, int]] = []
    for first, last in ranges:
        if joined and joined[-1][1] == first:
            joined[-1] = (joined[-1][0], last)
        else:
            joined.append((first, last))
    return tuple(joined)
