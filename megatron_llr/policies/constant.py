"""Policies that look only at a matrix's role: `uniform`, `embedding-only`, `fixed`."""

import json
import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from megatron_llr.config import LLR_TABLE, LLRConfig, flag
from megatron_llr.errors import user_error
from megatron_llr.matrices.ids import EMBEDDING_IDS, ROLES, ROUTER, MatrixId, value_for_role
from megatron_llr.policies.mean import mean_one

# What LLR's multipliers came to in the 1B run of arXiv 2605.22297: peak learning rates per type,
# read off its figure (6.2, 7.7, 13.5 and 25e-4) over the base rate of 5e-4. Good to a few percent.
LLR_CONSTANTS: Mapping[str, float] = {
    **dict.fromkeys(("q", "k"), 1.24),
    **dict.fromkeys(("v", "o"), 1.5),
    **dict.fromkeys(("gate", "up", "down"), 2.7),
    **dict.fromkeys(("embedding", "head"), 5.0),
}


def uniform(alphas: Mapping[MatrixId, float], config: LLRConfig) -> dict[MatrixId, float]:
    """Every multiplier 1: plain training, measured like the others."""
    return dict.fromkeys(alphas, 1.0)


def embedding_only(alphas: Mapping[MatrixId, float], config: LLRConfig) -> dict[MatrixId, float]:
    """Embedding and head at `config.embedding`, everything else at 1.

    The first control of LLR (arXiv 2605.22297): how much of its gain is a larger learning rate on
    the embedding? A larger one only there is also what arXiv 2502.19002 finds to matter most.
    """
    multiplier = config.embedding_multiplier()
    assert multiplier is not None, "checked in LLRConfig"
    raised = EMBEDDING_IDS - {"head"} if config.hyperball else EMBEDDING_IDS
    return {matrix: multiplier if matrix in raised else 1.0 for matrix in alphas}


@lru_cache(maxsize=4)
def read_role_table(path: str) -> Mapping[str, float]:
    """The multipliers per role in a JSON file, read once; `llr` names the built-in table.

    Raises:
        ValueError: if the file is no JSON object of known roles and positive finite numbers.
    """
    if path == LLR_TABLE:
        return LLR_CONSTANTS
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
            remedy=f"fix the file, or give {LLR_TABLE} for the constants that LLR converged to",
        )
    return {role: float(value) for role, value in table.items()}


def meaning_of(config: LLRConfig) -> dict[str, Any]:
    """`config.meaning()` with what the role table holds: its file may move, or be edited.

    Raises:
        ValueError: if the file cannot be read.
    """
    table = config.role_table
    held = None if table is None else dict(read_role_table(table))
    return {**config.meaning(), "role_table": held}


def fixed(alphas: Mapping[MatrixId, float], config: LLRConfig) -> dict[MatrixId, float]:
    """One multiplier per role, whatever the spectra say (`--llr-role-table`).

    With the table `llr`: the constants that LLR's multipliers converged to in its authors' 1B run
    (arXiv 2605.22297), which asks whether anything has to be measured at all. A table's `up` holds
    for shared experts and experts too, unless it names `shared.up` or `expert.up`.
    """
    assert config.role_table is not None
    table = read_role_table(config.role_table)
    if ROUTER in table and config.router == "one":
        raise user_error(
            f"{flag('role_table')} {config.role_table} names the router",
            got=f"{ROUTER}: {table[ROUTER]}",
            allowed=f"{flag('router')} policy, without which a router has multiplier 1",
            remedy=f"add {flag('router')} policy",
        )
    return mean_one({matrix: value_for_role(table, matrix, 1.0) for matrix in alphas}, config)
