"""The tables of `--llr-role-table`: patterns over matrix ids, and the factors that they give."""

import fnmatch
import json
import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from megatron_llr.config import LLRConfig, flag
from megatron_llr.errors import input_error, shown
from megatron_llr.matrices.ids import ROLES, ROUTER, MatrixId
from megatron_llr.matrices.info import MatrixIndex
from megatron_llr.output import and_more
from megatron_llr.policies.granularity import share_over_parameters
from megatron_llr.policies.registry import held_at_one
from megatron_llr.yaml_file import read_yaml

_TABLES = Path(__file__).parent / "tables"
"""Tables that the package ships, by their names without suffix."""

_YAML_SUFFIXES = frozenset({".yaml", ".yml"})
_WILDCARDS = re.compile(r"[*?\[]")
# Their alternatives multiply.
_MOST_BRACES = 8
_BRACES = re.compile(r"\{([^{}]*)\}")
_ALLOWED = (
    "a JSON file, or with the suffix .yaml or .yml a YAML file, that maps roles, matrix ids or "
    "patterns over ids (block.*.attention.k, block.{0,1}.mlp.*) to a finite multiplier of at least "
    f"0, or to a mapping with multiplier and weight_decay. Roles: {', '.join(ROLES)}"
)


@dataclass(frozen=True, slots=True)
class TableRow:
    """What a pattern gives to the matrices that it matches.

    Attributes:
        multiplier: factor on the learning rate; 0 freezes a matrix.
        weight_decay: factor on the weight decay.
    """

    multiplier: float = 1.0
    weight_decay: float = 1.0

    @classmethod
    def read(cls, value: Any) -> "TableRow":
        """A row from a file: a number, or a mapping.

        Raises:
            ValueError: if it is neither.
        """
        if not isinstance(value, Mapping):
            return cls(_factor(value))
        if not value or value.keys() - {"multiplier", "weight_decay"}:
            raise ValueError("a row has multiplier, weight_decay or both")
        return cls(**{name: _factor(factor) for name, factor in value.items()})

    def content(self) -> float | dict[str, float]:
        """The row as a file has it: a number if the weight decay is unchanged."""
        if self.weight_decay == 1.0:
            return self.multiplier
        return {"multiplier": self.multiplier, "weight_decay": self.weight_decay}


def _factor(value: Any) -> float:
    # YAML 1.1 reads 1e-3 as text.
    number = math.nan if isinstance(value, bool) else float(value)
    if not (math.isfinite(number) and number >= 0):
        raise ValueError(f"{shown(value)} is not a finite number of at least 0")
    return number


class RoleTable:
    """Rows by pattern. The first pattern that matches a matrix counts.

    A pattern is a role, a matrix id, or an id with wildcards: `*` is any characters, dots
    included, `?` is one, `[0-3]` one of a set, `{a,b}` a choice. The role `up` also
    matches `expert.up` and `shared.up`, unless the table names these.

    Args:
        name: the table in messages.
        rows: pattern -> row, in order.

    Raises:
        ValueError: if a pattern is neither a role, nor an id, nor has wildcards.
    """

    def __init__(self, name: str, rows: Mapping[str, TableRow]) -> None:
        self.name, self.rows = name, rows
        self._patterns = list(rows)
        # Role or id -> position of the first pattern that names it.
        self._named: dict[str, int] = {}
        self._globs: list[tuple[int, re.Pattern[str]]] = []
        for position, pattern in enumerate(rows):
            for alternative in _alternatives(pattern):
                if _WILDCARDS.search(alternative):
                    glob = re.compile(fnmatch.translate(alternative))
                    self._globs.append((position, glob))
                elif alternative in ROLES or MatrixId.read(alternative).role in ROLES:
                    self._named.setdefault(alternative, position)
                else:
                    raise ValueError(f"{shown(alternative)} is neither a role nor a matrix id")

    def pattern_of(self, matrix: MatrixId) -> str | None:
        """The pattern whose row a matrix has; None if none matches."""
        role = matrix.role
        if role not in self._named:
            role = role.removeprefix("expert.").removeprefix("shared.")
        named = [self._named[name] for name in (matrix, role) if name in self._named]
        first = min(named, default=len(self._patterns))
        for position, glob in self._globs:
            if position >= first:
                break
            if glob.match(matrix):
                first = position
                break
        return self._patterns[first] if first < len(self._patterns) else None

    def row(self, matrix: MatrixId) -> TableRow:
        """The row of a matrix; factors of 1 if no pattern matches it."""
        pattern = self.pattern_of(matrix)
        return TableRow() if pattern is None else self.rows[pattern]

    def names_routers(self) -> bool:
        """Whether a pattern is for routers only."""
        names = [name for pattern in self._patterns for name in _alternatives(pattern)]
        return any(name == ROUTER or name.endswith(f".{ROUTER}") for name in names)

    def content(self) -> dict[str, Any] | list[list[Any]]:
        """What the table gives, as plain JSON values that differ whenever its meaning does.

        A list where the order counts; roles are in no order.
        """
        held = {pattern: row.content() for pattern, row in self.rows.items()}
        return held if held.keys() <= set(ROLES) else [[*pair] for pair in held.items()]

    def report(self, matrices: Iterable[MatrixId]) -> list[str]:
        """Lines on matrices that no pattern matches, and on patterns that match none."""
        patterns = {matrix: self.pattern_of(matrix) for matrix in matrices}
        unmatched = [matrix for matrix, pattern in patterns.items() if pattern is None]
        used = set(patterns.values())
        unused = [pattern for pattern in self._patterns if pattern not in used]
        lines = []
        if unmatched:
            lines.append(
                f"{flag('role_table')} {self.name}: {len(unmatched)} of {len(patterns)} matrices "
                f"match no pattern and keep multiplier 1: {and_more(unmatched, 4)}"
            )
        if unused:
            lines.append(
                f"{flag('role_table')} {self.name}: patterns without effect, as no matrix matches "
                f"them or an earlier pattern does: {and_more(unused, 8)}"
            )
        return lines


def _alternatives(pattern: str) -> list[str]:
    """The patterns that braces stand for: `{a,b}.c` gives `a.c` and `b.c`.

    Raises:
        ValueError: if a brace has no partner, or there are too many.
    """
    if pattern.count("{") > _MOST_BRACES:
        raise ValueError(f"{shown(pattern)} has more than {_MOST_BRACES} braces")
    braces = _BRACES.search(pattern)
    if braces is None:
        if "{" in pattern or "}" in pattern:
            raise ValueError(f"{shown(pattern)} has a brace without a partner")
        return [pattern]
    before, after = pattern[: braces.start()], pattern[braces.end() :]
    options = braces[1].split(",")
    return [name for option in options for name in _alternatives(before + option + after)]


def _without_repeats(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    read: dict[str, Any] = {}
    for key, value in pairs:
        if key in read:
            raise ValueError(f"the key {shown(key)} is given twice")
        read[key] = value
    return read


def _load(path: Path) -> Any:
    """The content of a JSON or YAML file, without repeated keys."""
    if path.suffix in _YAML_SUFFIXES:
        return read_yaml(path)
    return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_without_repeats)


def shipped_tables() -> tuple[str, ...]:
    """Names of the tables in the package."""
    return tuple(sorted(path.stem for path in _TABLES.glob("*.yaml")))


@lru_cache(maxsize=4)
def read_role_table(path: str) -> RoleTable:
    """The table in a JSON or YAML file (by its suffix), or one of `shipped_tables`; read once.

    Raises:
        ValueError: if the file is no table.
    """
    try:
        rows = {}
        given = _load(_TABLES / f"{path}.yaml" if path in shipped_tables() else Path(path))
        if not isinstance(given, dict):
            raise ValueError(f"it is {shown(given)}, not a mapping")
        for pattern, value in given.items():
            if not isinstance(pattern, str):
                raise ValueError(f"the key {shown(pattern)} is not text")
            try:
                rows[pattern] = TableRow.read(value)
            except (TypeError, ValueError, OverflowError) as wrong:
                raise ValueError(f"{shown(pattern)}: {shown(value)}: {wrong}") from wrong
        return RoleTable(path, rows)
    except (OSError, ValueError, RecursionError) as broken:
        raise input_error(
            f"Cannot read {flag('role_table')} {path}: {broken}. It must be {_ALLOWED}. Correct "
            "the file (in YAML, quote a pattern that begins with {, [ or *), or give the name of a "
            f"table of this package: {', '.join(shipped_tables())}."
        ) from broken


def meaning_of(config: LLRConfig) -> dict[str, Any]:
    """`config.meaning()` with what the role table holds: its file may move, or be edited.

    Raises:
        ValueError: if the file cannot be read.
    """
    table = config.role_table
    held = None if table is None else read_role_table(table).content()
    return {**config.meaning(), "role_table": held}


def report_table(config: LLRConfig, matrix_index: MatrixIndex) -> list[str]:
    """Lines on what of the role table and of the model do not match; none without a table."""
    if config.role_table is None:
        return []
    held = held_at_one(matrix_index, config)
    tuned = [matrix for matrix in matrix_index if matrix not in held]
    return read_role_table(config.role_table).report(tuned)


def decay_factors(
    config: LLRConfig, matrix_index: MatrixIndex, inseparable: Collection[str]
) -> dict[MatrixId, float]:
    """Factors on the weight decay that the role table gives; a matrix left out has 1.

    Args:
        config: the settings.
        matrix_index: all matrices of the job.
        inseparable: matrices that share the mean factor of their parameter, because their optimizer
            cannot step parts of a tensor.
    """
    if config.role_table is None:
        return {}
    table, held = read_role_table(config.role_table), held_at_one(matrix_index, config)
    given = {m: 1.0 if m in held else table.row(m).weight_decay for m in matrix_index}
    shared = share_over_parameters(given, matrix_index, inseparable)
    return {matrix: factor for matrix, factor in shared.items() if factor != 1.0}
