"""The text of one JSON line."""

import json

from megatron_llr.errors import input_error

# Numbers are not used. Unlike `int`, `float` takes any number of digits.
_DECODER = json.JSONDecoder(parse_int=float)

_TYPES = {dict: "an object", list: "an array", float: "a number", bool: "a boolean"}


def text_of(line: bytes, key: str, place: str) -> bytes:
    """The value of a key, encoded as UTF-8.

    Args:
        line: one JSON object.
        key: key of the text.
        place: file and line number, for errors.

    Raises:
        ValueError: if the line is not a JSON object whose key has a string that UTF-8 can encode.
    """
    try:
        value = _DECODER.decode(line.decode("utf-8-sig"))
    except RecursionError:
        raise input_error(
            f"{place} cannot be parsed: its objects or arrays are nested too deeply. Each line "
            f'must be a JSON object like {{"{key}": "..."}}. Fix or remove the line.'
        ) from None
    except ValueError as broken:
        raise input_error(
            f"{place} is not JSON: {broken}. Each line must be one JSON object. Fix or remove "
            "the line, or set --format text."
        ) from None
    text = value.get(key) if isinstance(value, dict) else None
    if not isinstance(text, str):
        content = _TYPES.get(type(value), "null" if value is None else "a string")
        if isinstance(value, dict):
            content = f"the keys {', '.join(map(repr, value))}" if value else "no keys"
            if key in value:
                content = f"{_TYPES.get(type(text), 'null')} there"
        raise input_error(
            f"{place} has no text with the key {key!r}: it has {content[:200]}. It must be like "
            f'{{"{key}": "..."}}. Set --json-key to the key of the text.'
        )
    try:
        return text.encode()
    except UnicodeEncodeError as broken:
        raise input_error(
            f"{place} has an unpaired surrogate: {broken.reason}. It must be text that can be "
            "encoded as UTF-8. Fix or remove the line."
        ) from None
