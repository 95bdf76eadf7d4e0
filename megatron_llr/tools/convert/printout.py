"""The table that a conversion prints at the end: which tensor was written where."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from os.path import commonprefix

from megatron_llr.telemetry.tables import text_table
from megatron_llr.tools.convert.links import Link

_NUMBER = re.compile(r"\.\d+\.")


@dataclass
class Report:
    """What a conversion did.

    Attributes:
        links: tensors, in order.
        notes: lines about what was not converted, copied and padded.
    """

    links: list[Link] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def numel(self) -> int:
        """Parameters of the model, without padding."""
        return sum(part.numel for link in self.links for part in link.parts)

    def lines(self, *, to_megatron: bool) -> Iterable[str]:
        """The table: one line for each kind of tensor, with its shape and count, then the notes."""
        kinds: Counter[tuple[str, str, str]] = Counter()
        for link in self.links:
            hugging_face = _braced(
                # Without the prefix that all layers share.
                [_NUMBER.split(part.name, maxsplit=1)[-1] for part in link.parts]
            )
            names = (hugging_face, link.key) if to_megatron else (link.key, hugging_face)
            kinds[*names, " x ".join(map(str, link.shape))] += 1
        sides = ("Hugging Face", "Megatron") if to_megatron else ("Megatron", "Hugging Face")
        width = max(len(source) for source, _, _ in [*kinds, (*sides, "")])
        rows = [
            (f"{source:<{width}} -> {target}", shape, count)
            for (source, target, shape), count in kinds.items()
        ]
        header = (f"{sides[0]:<{width}} -> {sides[1]}", "Megatron shape", "count")
        yield from text_table(header, rows).splitlines()
        yield from self.notes


def _braced(names: Sequence[str]) -> str:
    """`self_attn.{q,k,v}_proj.weight` for three names that differ in one run of letters."""
    if len(names) == 1:
        return names[0]
    # Common prefix of the strings, not of their path components.
    head = commonprefix(names)  # noqa: RUF071
    tail = commonprefix([name[::-1] for name in names])[::-1]  # noqa: RUF071
    return head + "{" + ",".join(name[len(head) : -len(tail)] for name in names) + "}" + tail
