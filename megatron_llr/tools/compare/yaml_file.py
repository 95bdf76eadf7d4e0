"""The YAML file of a grid: unknown contents, read in bounded time and memory."""

import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_llr.errors import first_line, input_error, shown

_MAX_BYTES = 256 * 2**10
# Keys of one mapping after `<<` merges. Merges of merges double the keys of every level.
_MAX_KEYS = 500
_MAX_DEPTH = 20


def read_yaml(path: Path) -> Any:
    """The document in a YAML file: plain Python values.

    Aliases are references to one object, so a document is never larger than its file.

    Raises:
        ValueError: if the file cannot be read or is not YAML; the text names file and line.
        ImportError: if PyYAML is not installed.
    """
    try:
        import yaml
    except ImportError as missing:
        raise ImportError("Grids need PyYAML: pip install 'megatron-llr[compare]'") from missing

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        depth = 0

        def compose_node(self, parent: Any, index: Any) -> Any:
            self.depth += 1
            if self.depth > _MAX_DEPTH:
                problem = f"nested more than {_MAX_DEPTH} deep"
                raise yaml.composer.ComposerError(None, None, problem, self.peek_event().start_mark)
            node = super().compose_node(parent, index)
            self.depth -= 1
            return node

        def flatten_mapping(self, node: Any) -> None:
            super().flatten_mapping(node)
            if len(node.value) > _MAX_KEYS:
                problem = f"more than {_MAX_KEYS} keys in a mapping"
                raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)

    def unreadable(reason: str) -> ValueError:
        return input_error(
            f"Cannot read the grid {path}: {reason}. It must be a readable YAML file. Correct the "
            "path or the file."
        )

    try:
        if path.exists() and not path.is_file():
            raise unreadable("it is not a regular file")
        if path.stat().st_size > _MAX_BYTES:
            raise unreadable(f"it is larger than {_MAX_BYTES} bytes")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as broken:
        raise unreadable(str(broken)) from broken
    try:
        return yaml.load(text, Loader)
    except yaml.MarkedYAMLError as broken:
        mark = broken.problem_mark or broken.context_mark
        line = f"line {mark.line + 1}: " if mark else ""
        raise unreadable(f"{line}{broken.problem or broken.context}") from broken
    except Exception as broken:
        # Of values that PyYAML takes for dates or numbers: ValueError, OverflowError; with a tag
        # such as !!int also KeyError, IndexError and AttributeError.
        raise unreadable(f"{type(broken).__name__}: {first_line(broken)[:200]}") from broken


class GridFile:
    """The keys of one YAML file, each checked as it is read."""

    def __init__(self, path: Path, values: Mapping[str, Any]) -> None:
        self.path, self.values = path, values

    def refused(self, got: object, allowed: str) -> ValueError:
        """The error for one key."""
        return input_error(
            f"The grid {self.path} has {got}. It must have {allowed}. Correct the file."
        )

    def text(self, value: Any, key: str) -> str:
        """A word or a path; YAML may have read it as a number."""
        valid = isinstance(value, (str, int, float)) and not isinstance(value, bool)
        if valid:
            try:
                text = str(value)
                # What the operating system takes as an argument and as a name.
                valid = bool(os.fsencode(text)) and "\0" not in text
            except ValueError:
                valid = False
        if not valid:
            raise self.refused(f"{key}: {shown(value)}", "text there, in quotes if it is a word")
        return text

    def words(self, text: Any, key: str) -> tuple[str, ...]:
        """Flags given as one string or as a list of words; none if absent."""
        if text is None or text == "":
            return ()
        if isinstance(text, str):
            try:
                return tuple(shlex.split(self.text(text, key), comments=True))
            except ValueError as broken:
                raise self.refused(
                    f"{key}: {shown(text)} ({first_line(broken)})", "flags with closed quotes there"
                ) from None
        if isinstance(text, list):
            return tuple(self.text(word, key) for word in text)
        raise self.refused(f"{key}: {shown(text)}", "flags in one string or in a list of words")

    def numbers(self, values: Any, kind: type, key: str, *, above_0: bool) -> tuple[Any, ...]:
        """Distinct numbers; floats must differ in the six digits that a folder is named with."""
        try:
            if not isinstance(values, list):
                raise TypeError
            numbers = tuple(_number(value, kind) for value in values)
        except (TypeError, ValueError, OverflowError):
            numbers = ()
        if not numbers or len(set(numbers)) < len(numbers) or (above_0 and not min(numbers) > 0):
            whole = "whole " if kind is int else ""
            allowed = f"a list of distinct {whole}numbers there, all below 2^63"
            raise self.refused(
                f"{key}: {shown(values)}", allowed + (" and all above 0" if above_0 else "")
            )
        if kind is float and len({f"{value:g}" for value in numbers}) < len(numbers):
            raise self.refused(
                f"{key}: {shown(values)}", "values that differ in their first six digits"
            )
        return numbers

    def number(self, key: str, default: float) -> float:
        """A number from 0 to 2^63."""
        value = self.values.get(key, default)
        try:
            number: float = _number(value, float)
        except (TypeError, ValueError, OverflowError):
            number = -1
        if number < 0:
            raise self.refused(f"{key}: {shown(value)}", "a number there, 0 or more")
        return number

    def whole(self, key: str, *, least: int) -> int:
        """A whole number."""
        number = self.number(key, least)
        if number != int(number) or number < least:
            raise self.refused(
                f"{key}: {shown(self.values[key])}", f"a whole number there, {least} or more"
            )
        return int(number)

    def switch(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self.values.get(key, default)
        if not isinstance(value, bool):
            raise self.refused(f"{key}: {shown(value)}", "true or false there")
        return value


def _number(value: Any, kind: type) -> Any:
    """A number that YAML read as one or, such as 1e-3, as a string.

    Raises:
        ValueError, TypeError, OverflowError: if it is none, not finite, or too large.
    """
    if isinstance(value, bool):
        raise TypeError
    exact = isinstance(value, int) or (kind is int and isinstance(value, str))
    number = int(value) if exact else float(value)
    if not abs(number) < 2**63 or (kind is int and number != int(number)):
        raise ValueError
    return kind(number)
