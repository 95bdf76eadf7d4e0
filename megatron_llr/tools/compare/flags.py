"""Command lines as lists of words: what a flag is set to, and which flags they hold."""

from collections.abc import Sequence

# Flags of the extension that say nothing about the policy.
_NOT_OF_THE_POLICY = frozenset(
    "--llr-device --llr-dry-run --llr-fixed-validation --llr-log-dir --llr-reset-state "
    "--llr-same-start".split()
)


def value_of(words: Sequence[str], flag: str) -> str | None:
    """What a flag is set to, the last time it is set; "" for one without a value; else None."""
    found = None
    for position, word in enumerate(words):
        if word == flag:
            after = words[position + 1] if position + 1 < len(words) else "--"
            found = "" if after.startswith("--") else after
        elif word.startswith(flag + "="):
            found = word.removeprefix(flag + "=")
    return found


def names(words: Sequence[str]) -> list[str]:
    """The flags in a command line, in order, once each."""
    return list(dict.fromkeys(w.partition("=")[0] for w in words if w.startswith("--")))


def settings(words: Sequence[str]) -> dict[str, str]:
    """Flag -> all the words given to it, the last time it is set."""
    found: dict[str, str] = {}
    flag = ""
    for word in words:
        if word.startswith("--"):
            flag, _, value = word.partition("=")
            found[flag] = value
        elif flag:
            found[flag] = f"{found[flag]} {word}".strip()
    return found


def beyond_policy(words: Sequence[str], control: Sequence[str]) -> list[str]:
    """Flags in which two runs differ that are not settings of a policy."""
    ours, theirs = settings(words), settings(control)
    return sorted(
        flag
        for flag in ours.keys() | theirs.keys()
        if ours.get(flag) != theirs.get(flag)
        and (not flag.startswith("--llr-") or flag in _NOT_OF_THE_POLICY)
    )
