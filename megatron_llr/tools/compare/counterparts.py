"""Control policies added for every esd policy of a grid, which separate its effects.

The gain of LLR over a uniform rate mixes the embedding's larger rate, the larger mean of the other
rates, and their order. `embedding-only` against uniform measures the first, esd against itself
with mean 1 the second. The third is esd with mean 1 against a random order and against the inverse;
against `shape` it is what the spectra add to the shapes of the matrices, against `role-mean` what
blocks add to roles.
"""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_llr.tools.compare.command_flags import value_of, values_by_flag

_MEAN_1 = "--llr-mean-preserving"
Policies = Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class Effect:
    """A difference of two policies and what it measures."""

    meaning: str
    policy: str
    against: str


def _policy_kind(words: Sequence[str]) -> str:
    return value_of(words, "--llr-policy") or "esd"


def _embedding(words: Sequence[str]) -> str:
    return value_of(words, "--llr-embedding") or "max"


def _embedding_control(name: str, policies: Policies, shared: Sequence[str]) -> str | None:
    """The policy that has the embedding rate of `name` and 1 elsewhere, if there is one."""
    flags = [*shared, *policies[name]]
    for other, words in policies.items():
        other_flags = [*shared, *words]
        if (
            _policy_kind(other_flags) == "embedding-only"
            and _embedding(other_flags) == _embedding(flags)
            and value_of(other_flags, "--llr-max-multiplier")
            == value_of(flags, "--llr-max-multiplier")
        ):
            return other
    return None


def _counterparts_of(name: str, policies: Policies, shared: Sequence[str]) -> Policies:
    """Name -> flags of all counterparts that an esd policy should have."""
    words, flags = policies[name], [*shared, *policies[name]]
    mean_1 = () if _MEAN_1 in flags else (_MEAN_1,)
    kinds = ["random", "inverse", "shape", "role-mean"]
    estimator, spectrum = (value_of(flags, f"--llr-{of}") for of in ("estimator", "spectrum"))
    if estimator not in (None, "hill_median") or spectrum not in (None, "exact"):
        # `shape` has no exponents for these.
        kinds.remove("shape")
    wanted = {f"{name}-{kind}": (*words, *mean_1, "--llr-policy", kind) for kind in kinds}
    if mean_1:
        wanted = {f"{name}-mean1": (*words, _MEAN_1), **wanted}
    if _embedding(flags) not in ("one", "measured") and not _embedding_control(
        name, policies, shared
    ):
        wanted[f"{name}-embedding-only"] = (*words, "--llr-policy", "embedding-only")
    return wanted


def with_counterparts(
    policies: Policies, shared: Sequence[str], control: str
) -> dict[str, tuple[str, ...]]:
    """Add the missing ones of every esd policy's counterparts.

    Args:
        policies: name -> flags.
        shared: flags of all runs.
        control: the policy that all are compared with; it gets no counterparts.

    Returns:
        The policies and, for an esd policy `name`: `name-mean1`, `name-random`, `name-inverse`,
        `name-shape`, `name-role-mean` (these with the mean of the others at 1) and
        `name-embedding-only`, unless such a policy exists, its embedding has no separate rate, or
        `shape` does not allow its spectra.

    Raises:
        ValueError: if a policy has the name of a counterpart but different flags.
    """
    completed = dict(policies)
    for name, words in policies.items():
        flags = [*shared, *words]
        if (
            name == control
            or _policy_kind(flags) != "esd"
            or value_of(flags, "--llr-inverse") is not None
        ):
            continue
        wanted = _counterparts_of(name, completed, shared)
        for other, counterpart in wanted.items():
            mine = policies.get(other, counterpart)
            if values_by_flag([*shared, *mine]) != values_by_flag([*shared, *counterpart]):
                raise ValueError(
                    f"policy {other} with {shlex.join(mine)}, but that is the name of {name}'s "
                    f"counterpart with {shlex.join(counterpart)}"
                )
        present = [values_by_flag(other) for other in completed.values()]
        for other, counterpart in wanted.items():
            if values_by_flag(counterpart) not in present:
                completed.setdefault(other, counterpart)
    return completed


def _with_farms(name: str, policies: Policies, shared: Sequence[str]) -> str:
    """The policy that differs from `name` only in FARMS spectra; empty if there is none."""

    def without_spectrum(words: Sequence[str]) -> dict[str, str]:
        values = values_by_flag([*shared, *words])
        return {
            flag: value
            for flag, value in values.items()
            if flag not in ("--llr-spectrum", "--llr-farms-rows", "--llr-farms-windows")
        }

    for other, words in policies.items():
        if value_of([*shared, *words], "--llr-spectrum") == "farms" and without_spectrum(
            words
        ) == without_spectrum(policies[name]):
            return other if other != name else ""
    return ""


def effects(policies: Policies, shared: Sequence[str], control: str) -> list[Effect]:
    """The differences that separate the effects, for every esd policy with counterparts."""
    available = []
    for name, words in policies.items():
        if name == control or _policy_kind([*shared, *words]) != "esd":
            continue
        ordered = f"{name}-mean1" if f"{name}-mean1" in policies else name
        only = _embedding_control(name, policies, shared)
        wanted = [
            Effect("all together", name, control),
            Effect("the embedding's rate", only or "", control),
            Effect("the rest, same embedding rate", name, only or ""),
            Effect("the mean of the others", name, f"{name}-mean1"),
            Effect("their order, against random", ordered, f"{name}-random"),
            Effect("their order, against inverse", ordered, f"{name}-inverse"),
            Effect("beyond shape", ordered, f"{name}-shape"),
            Effect("beyond role (order of blocks)", ordered, f"{name}-role-mean"),
        ]
        wanted += [
            Effect("shape removed by FARMS", _with_farms(each, policies, shared), each)
            for each in dict.fromkeys((name, ordered))
        ]
        if f"{name}-random" in policies:
            available += [e for e in wanted if e.policy in policies and e.against in policies]
    return available
