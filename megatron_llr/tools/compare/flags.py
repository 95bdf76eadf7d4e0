"""Flags in command lines given as lists of words."""

from collections.abc import Sequence

# Flags of the extension that are not settings of a policy.
_NOT_OF_THE_POLICY = frozenset(
    "--llr-device --llr-dry-run --llr-fixed-validation --llr-log-dir --llr-reset-state "
    "--llr-same-start".split()
)


def value_of(words: Sequence[str], flag: str) -> str | None:
    """The last value of a flag; "" for a flag without a value; None if it is not set."""
    value = None
    for position, word in enumerate(words):
        if word == flag:
            after = words[position + 1] if position + 1 < len(words) else "--"
            value = "" if after.startswith("--") else after
        elif word.startswith(flag + "="):
            value = word.removeprefix(flag + "=")
    return value


def names(words: Sequence[str]) -> list[str]:
    """The flags in a command line, in order, once each."""
    return list(dict.fromkeys(w.partition("=")[0] for w in words if w.startswith("--")))


def settings(words: Sequence[str]) -> dict[str, str]:
    """Flag -> all words of its last occurrence."""
    values: dict[str, str] = {}
    flag = ""
    for word in words:
        if word.startswith("--"):
            flag, _, value = word.partition("=")
            values[flag] = value
        elif flag:
            values[flag] = f"{values[flag]} {word}".strip()
    return values


def beyond_policy(words: Sequence[str], control: Sequence[str]) -> list[str]:
    """Flags in which two runs differ that are not settings of a policy."""
    ours, theirs = settings(words), settings(control)
    return sorted(
        flag
        for flag in ours.keys() | theirs.keys()
        if ours.get(flag) != theirs.get(flag)
        and (not flag.startswith("--llr-") or flag in _NOT_OF_THE_POLICY)
    )
