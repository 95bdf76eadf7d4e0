"""Flags in command lines given as lists of words."""

from collections.abc import Sequence

from megatron_llr.config import LLRConfig, flag, settings_of
from megatron_llr.script_config import ScriptConfig

# Flags of the extension that are not settings of a policy: where and how a run starts and writes.
_NOT_OF_THE_POLICY = frozenset(
    flag(name)
    for config_type in (LLRConfig, ScriptConfig)
    for name in settings_of(config_type, "start", "local")
)


def value_of(words: Sequence[str], name: str) -> str | None:
    """The last value of a flag; "" for a flag without a value; None if it is not set."""
    value = None
    for position, word in enumerate(words):
        if word == name:
            after = words[position + 1] if position + 1 < len(words) else "--"
            value = "" if after.startswith("--") else after
        elif word.startswith(name + "="):
            value = word.removeprefix(name + "=")
    return value


def names(words: Sequence[str]) -> list[str]:
    """The flags in a command line, in order, once each."""
    return list(dict.fromkeys(w.partition("=")[0] for w in words if w.startswith("--")))


def values_by_flag(words: Sequence[str]) -> dict[str, str]:
    """Flag -> all words of its last occurrence."""
    values: dict[str, str] = {}
    name = ""
    for word in words:
        if word.startswith("--"):
            name, _, value = word.partition("=")
            values[name] = value
        elif name:
            values[name] = f"{values[name]} {word}".strip()
    return values


def beyond_policy(words: Sequence[str], control: Sequence[str]) -> list[str]:
    """Flags in which two runs differ that are not settings of a policy."""
    ours, theirs = values_by_flag(words), values_by_flag(control)
    return sorted(
        name
        for name in ours.keys() | theirs.keys()
        if ours.get(name) != theirs.get(name)
        and (not name.startswith("--llr-") or name in _NOT_OF_THE_POLICY)
    )
