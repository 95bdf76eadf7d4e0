"""Errors for users: what is wrong, what was given, what is allowed, which flag or action fixes it.

The text is the same on every rank.
"""

import reprlib


def message(what: str, *, got: object, allowed: str, remedy: str) -> str:
    """The text of an error about one value: a line of short sentences.

    Args:
        what: what is wrong, without a full stop.
        got: the value given.
        allowed: the values allowed.
        remedy: an instruction that fixes it.
    """
    instruction = remedy[:1].upper() + remedy[1:]
    return f"megatron_llr: {what}: {got}. Allowed: {allowed}. {instruction}."


def first_line(error: BaseException) -> str:
    """The first line of an error's text; empty if it has none."""
    return (str(error).splitlines() or [""])[0]


def shown(value: object) -> str:
    """A value from a file for an error message: one line, of limited length."""
    try:
        return reprlib.repr(value)
    except ValueError:
        # Python refuses to print an integer of thousands of digits.
        return f"a {type(value).__name__} that is too long to print"


def user_error(what: str, *, got: object, allowed: str, remedy: str) -> ValueError:
    """An error that a user fixes by changing a flag, a file or an installed package."""
    return ValueError(message(what, got=got, allowed=allowed, remedy=remedy))


def input_error(text: str) -> ValueError:
    """The same in the caller's own sentences.

    They say what is wrong, what was given, what is allowed, and which flag or action fixes it.
    """
    return ValueError(f"megatron_llr: {text}")


def topology_error(what: str, *, got: object, allowed: str, remedy: str) -> RuntimeError:
    """An error in how ranks are arranged, or a difference between them."""
    return RuntimeError(message(what, got=got, allowed=allowed, remedy=remedy))
