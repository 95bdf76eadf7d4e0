"""The table that ends a conversion: what went where."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from os.path import commonprefix

from megatron_llr.tools.convert.links import Link

_NUMBER = re.compile(r"\.\d+\.")


@dataclass
class Report:
    """What a conversion did.

    Attributes:
        links: tensors, in order.
        notes: lines on what was left behind, carried over, padded.
    """

    links: list[Link] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def numel(self) -> int:
        """Parameters of the model, without padding."""
        return sum(part.numel for link in self.links for part in link.parts)

    def lines(self, *, to_megatron: bool) -> Iterable[str]:
        """The table: one line for each kind of tensor, with its shape and count, then the notes."""
        kinds: dict[tuple[str, str, str], int] = {}
        for link in self.links:
            theirs = _together([_short(part.name) for part in link.parts])
            shape = " x ".join(map(str, link.shape))
            key = (theirs, link.key, shape)
            kinds[key] = kinds.get(key, 0) + 1
        rows = [("Hugging Face", "Megatron", "shape there", "count")]
        rows += [
            (theirs, ours, shape, str(count)) for (theirs, ours, shape), count in kinds.items()
        ]
        if not to_megatron:
            rows = [(ours, theirs, shape, count) for theirs, ours, shape, count in rows]
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        for row in rows:
            first, second, shape, count = (
                cell.ljust(width) for cell, width in zip(row, widths, strict=True)
            )
            yield f"{first} -> {second}  {shape}  {count}".rstrip()
        yield from self.notes


def _together(names: Sequence[str]) -> str:
    """`self_attn.{q,k,v}_proj.weight` for three names that differ in one run of letters."""
    if len(names) == 1:
        return names[0]
    # Letter by letter is meant.
    head = commonprefix(names)  # noqa: RUF071
    tail = commonprefix([name[::-1] for name in names])[::-1]  # noqa: RUF071
    return head + "{" + ",".join(name[len(head) : -len(tail)] for name in names) + "}" + tail


def _short(name: str) -> str:
    """A tensor's name without what all layers share."""
    return _NUMBER.split(name, maxsplit=1)[-1]
