"""Rows of the table, the table, and the JSON file."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from megatron_llr.output import replaced_file

Status = Literal["ok", "FAILED", "not applicable", "not run"]

CHECKS = {
    "uniform": "--llr-policy uniform is bitwise plain Megatron",
    "multipliers": "exponents and multipliers are those of the first layout",
    "rates": "every element moves at base learning rate times multiplier",
    "resume": "saved inside a ramp and resumed bitwise",
}
"""Check -> what it proves."""

_VERSION = 1


@dataclass
class Cell:
    """The result of one check.

    Attributes:
        status: of all ranks together.
        note: what was compared; why it failed or was not run.
    """

    status: Status = "not run"
    note: str = ""


@dataclass
class Row:
    """The results of one layout.

    Attributes:
        layout: its name.
        model: name of its model.
        flags: Megatron's flags of its runs, without the paths of checkpoints.
        cells: per check of CHECKS.
        seconds: that it took.
    """

    layout: str
    model: str
    flags: list[str] = field(default_factory=list)
    cells: dict[str, Cell] = field(default_factory=lambda: {name: Cell() for name in CHECKS})
    seconds: float = 0.0

    @property
    def failed(self) -> bool:
        """Whether a check failed."""
        return any(cell.status == "FAILED" for cell in self.cells.values())

    def set_all(self, status: Status, note: str) -> None:
        """Give a result to every check that has none."""
        for cell in self.cells.values():
            if cell.status == "not run":
                cell.status, cell.note = status, note


def spelled(ranks: Sequence[int]) -> str:
    """`rank 3`, `ranks 0-2, 5`."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and runs[-1][1] == rank - 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    text = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
    return f"rank{'s' if len(ranks) > 1 else ''} {text}"


def combined(cells: Sequence[Mapping[str, str]]) -> Cell:
    """One result from those of all ranks: the first failure, else the first that is not ok."""
    for status in ("FAILED", "not run", "not applicable"):
        ranks = [rank for rank, cell in enumerate(cells) if cell["status"] == status]
        if ranks:
            note = cells[ranks[0]]["note"]
            where = "" if len(ranks) == len(cells) else f" (rank {ranks[0]})"
            return Cell(status, f"{note}{where}")
    return Cell("ok", cells[0]["note"])


def table(rows: Sequence[Row]) -> str:
    """A line per layout, then a line per check that is not ok."""
    lines = [["layout", "model", *CHECKS, "seconds"]]
    lines += [
        [row.layout, row.model, *(cell.status for cell in row.cells.values()), f"{row.seconds:.1f}"]
        for row in rows
    ]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    text = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]
    # Note -> the rows, or the checks of rows, that it is about.
    notes: dict[str, list[str]] = {}
    for row in rows:
        for name, cell in row.cells.items():
            if cell.status == "ok":
                continue
            whole = all(other == cell for other in row.cells.values())
            about = notes.setdefault(f"{cell.status}: {cell.note}", [])
            about += [row.layout] if whole and name == "uniform" else []
            about += [] if whole else [f"{row.layout} {name}"]
    text += [f"{', '.join(about)}: {note}" for note, about in notes.items()]
    return "\n".join(text)


@dataclass
class Results:
    """Everything that goes to the JSON file.

    Attributes:
        ranks: of the job.
        device: cuda or cpu.
        environment: `environment.describe` of rank 0.
        hosts: host of every rank.
        problems: what failed apart from rows, a line each.
        rows: a row per selected layout.
        seconds: that the job took.
    """

    ranks: int
    device: str = ""
    environment: dict[str, Any] = field(default_factory=dict)
    hosts: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def failed(self) -> bool:
        """Whether the exit code is 1."""
        return bool(self.problems) or any(row.failed for row in self.rows)

    def write(self, path: Path) -> None:
        """Write the JSON file, complete or not at all."""
        document: dict[str, Any] = {
            "version": _VERSION,
            "result": "FAILED" if self.failed else "ok",
        }
        document |= {"checks": CHECKS, **asdict(self)}
        with replaced_file(path) as partial:
            partial.write_text(json.dumps(document, indent=1) + "\n")
