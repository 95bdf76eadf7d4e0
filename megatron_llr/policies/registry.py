"""The policies by name. A policy turns the exponents of a measurement into target multipliers."""

import json
import math
from collections.abc import Callable, Mapping
from functools import lru_cache

from megatron_llr.config import LLRConfig, flag
from megatron_llr.errors import user_error
from megatron_llr.policies.assign import assign_multipliers
from megatron_llr.records import ROLES, role_of

Policy = Callable[[Mapping[str, float], LLRConfig], dict[str, float]]


def uniform(alphas: Mapping[str, float], config: LLRConfig) -> dict[str, float]:
    """Every multiplier 1: the control run, measured like the others."""
    return dict.fromkeys(alphas, 1.0)


@lru_cache(maxsize=4)
def read_role_table(path: str) -> Mapping[str, float]:
    """The multipliers per role in a JSON file, read once.

    Raises:
        ValueError: if the file is no JSON object of known roles and positive finite numbers.
    """
    try:
        with open(path, encoding="utf-8") as file:
            table = json.load(file)
        wrong = [
            f"{role!r}: {value!r}"
            for role, value in table.items()
            if role not in ROLES or not (math.isfinite(value) and value > 0)
        ]
    except (OSError, ValueError, TypeError, AttributeError) as broken:
        wrong = [f"{type(broken).__name__}: {broken}"]
    if wrong:
        raise user_error(
            f"bad {flag('role_table')} {path}",
            got="; ".join(wrong),
            allowed=f"a JSON object of roles ({', '.join(ROLES)}) and finite numbers above 0",
            remedy="mend the file",
        )
    return {role: float(value) for role, value in table.items()}


def fixed(alphas: Mapping[str, float], config: LLRConfig) -> dict[str, float]:
    """One multiplier per role, whatever the spectra say."""
    assert config.role_table is not None
    table = read_role_table(config.role_table)
    return {matrix: table.get(role_of(matrix), 1.0) for matrix in alphas}


POLICIES: dict[str, Policy] = {
    # LLR: "One LR Doesn't Fit All", arXiv 2605.22297
    "esd": assign_multipliers,
    "uniform": uniform,
    "fixed": fixed,
}


def targets_for(alphas: Mapping[str, float], config: LLRConfig) -> dict[str, float]:
    """Targets that `config.policy` gives; a matrix left out keeps its multiplier."""
    return POLICIES[config.policy](alphas, config)
