"""Errors that say what, what was got, what is allowed, and what mends it."""


def message(what: str, *, got: object, allowed: str, remedy: str) -> str:
    """One line in the form that every error of this package takes."""
    return f"megatron_llr: {what}: got {got}; allowed: {allowed}; {remedy}"


def first_line(error: BaseException) -> str:
    """What an error says, without what follows in further lines."""
    return (str(error).splitlines() or [""])[0]


def user_error(what: str, *, got: object, allowed: str, remedy: str) -> ValueError:
    """An error that a user mends by changing a flag, a file or an installed package."""
    return ValueError(message(what, got=got, allowed=allowed, remedy=remedy))


def input_error(text: str) -> ValueError:
    """An error in what a user gave, in sentences.

    They say what is wrong, what was given, what is allowed, and which flag or action fixes it.
    """
    return ValueError(f"megatron_llr: {text}")


def topology_error(what: str, *, got: object, allowed: str, remedy: str) -> RuntimeError:
    """An error in how ranks are arranged or in what they tell each other."""
    return RuntimeError(message(what, got=got, allowed=allowed, remedy=remedy))
