"""The values of a grid file, each checked as it is read."""

import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_llr.errors import first_line, input_error, shown


class GridFile:
    """The keys of a grid file, and the error that refuses a value."""

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
