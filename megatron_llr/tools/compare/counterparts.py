"""The controls that every esd policy of a grid gets, so that three effects can be told apart.

The gain of LLR over a uniform rate mixes the embedding's larger rate, the larger mean of the
others, and their order. `embedding-only` against uniform shows the first, esd against itself with
mean 1 the second, and with the mean held at 1 esd against a random order and against the inverse
the third.
"""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_llr.tools.compare.flags import settings, value_of

_MEAN_1 = "--llr-mean-preserving"
Policies = Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class Effect:
    """A difference of two policies and what it shows."""

    meaning: str
    policy: str
    against: str


def _kind(words: Sequence[str]) -> str:
    return value_of(words, "--llr-policy") or "esd"


def _embedding(words: Sequence[str]) -> str:
    return value_of(words, "--llr-embedding") or "max"


def _embedding_only(name: str, policies: Policies, shared: Sequence[str]) -> str | None:
    """The policy that has the embedding rate of `name` and 1 elsewhere, if there is one."""
    asked = [*shared, *policies[name]]
    for other, words in policies.items():
        here = [*shared, *words]
        if (
            _kind(here) == "embedding-only"
            and _embedding(here) == _embedding(asked)
            and value_of(here, "--llr-max-multiplier") == value_of(asked, "--llr-max-multiplier")
        ):
            return other
    return None


def with_counterparts(
    policies: Policies, shared: Sequence[str], control: str
) -> dict[str, tuple[str, ...]]:
    """Add what is missing of every esd policy's four counterparts.

    Args:
        policies: name -> flags.
        shared: flags of all runs.
        control: the policy that all are compared with; it gets none.

    Returns:
        The policies and, for an esd policy `name`: `name-mean1`, `name-random`, `name-inverse`
        (these with the mean of the others at 1) and, unless there is such a policy or its embedding
        has no rate of its own, `name-embedding-only`.

    Raises:
        ValueError: if a policy has the name of a counterpart and other flags.
    """
    found = dict(policies)
    for name, words in policies.items():
        flags = [*shared, *words]
        if name == control or _kind(flags) != "esd" or value_of(flags, "--llr-inverse") is not None:
            continue
        mean_1 = () if _MEAN_1 in flags else (_MEAN_1,)
        wanted = {
            f"{name}-random": (*words, *mean_1, "--llr-policy", "random"),
            f"{name}-inverse": (*words, *mean_1, "--llr-policy", "inverse"),
        }
        if mean_1:
            wanted = {f"{name}-mean1": (*words, _MEAN_1), **wanted}
        if _embedding(flags) not in ("one", "measured") and not _embedding_only(
            name, found, shared
        ):
            wanted[f"{name}-embedding-only"] = (*words, "--llr-policy", "embedding-only")
        for other, counterpart in wanted.items():
            mine = policies.get(other, counterpart)
            if settings([*shared, *mine]) != settings([*shared, *counterpart]):
                raise ValueError(
                    f"policy {other} with {shlex.join(mine)}, the name of {name}'s counterpart "
                    f"with {shlex.join(counterpart)}"
                )
        present = [settings(other) for other in found.values()]
        for other, counterpart in wanted.items():
            if settings(counterpart) not in present:
                found.setdefault(other, counterpart)
    return found


def effects(policies: Policies, shared: Sequence[str], control: str) -> list[Effect]:
    """The differences that tell the three effects apart, for every esd policy that has them."""
    found = []
    for name, words in policies.items():
        if name == control or _kind([*shared, *words]) != "esd":
            continue
        ordered = f"{name}-mean1" if f"{name}-mean1" in policies else name
        only = _embedding_only(name, policies, shared)
        wanted = [
            Effect("all together", name, control),
            Effect("the embedding's rate", only or "", control),
            Effect("the rest, embedding alike", name, only or ""),
            Effect("the mean of the others", name, f"{name}-mean1"),
            Effect("their order, against random", ordered, f"{name}-random"),
            Effect("their order, against inverse", ordered, f"{name}-inverse"),
        ]
        if f"{name}-random" in policies:
            found += [e for e in wanted if e.policy in policies and e.against in policies]
    return found
