"""From the name of a policy to its targets. A policy turns exponents into target multipliers."""

import importlib
import math
from collections.abc import Callable, Iterable, Mapping
from functools import reduce
from typing import Any

from megatron_llr.config import LLRConfig, flag
from megatron_llr.errors import input_error, user_error
from megatron_llr.matrices.ids import ROUTER, MatrixId
from megatron_llr.policy_table import ACTS_ON, LEARNING_RATE, POLICIES, row_of

Policy = Callable[[Mapping[MatrixId, float], LLRConfig], Mapping[MatrixId, float]]
"""(matrix id -> exponent, settings) -> (matrix id -> multiplier).

The ids are those of all matrices that may be tuned, in model order, but the routers unless
`--llr-router policy`; an exponent is NaN where there is none. A matrix left out keeps its
multiplier. The function runs on every rank and must give the same everywhere. With an attribute
`acts_on = "weight_decay"` its multipliers are factors on the decay.
"""


def _refused(name: str, got: object) -> ValueError:
    return user_error(
        f"bad {flag('policy')} {name}",
        got=got,
        allowed=f"{', '.join(POLICIES)}, or package.module:function of a function that can be "
        "imported (PYTHONPATH)",
        remedy=f"fix the function, or set {flag('policy')}",
    )


def load_policy(name: str) -> Policy:
    """The function of a policy, from the table or by import path.

    Raises:
        ValueError: if it cannot be imported or is no function.
    """
    module, _, attribute = row_of(name).path.partition(":")
    try:
        found: Any = reduce(getattr, attribute.split("."), importlib.import_module(module))
    except (ImportError, AttributeError) as missing:
        raise _refused(name, f"{type(missing).__name__}: {missing}") from missing
    if not callable(found):
        raise _refused(name, f"a {type(found).__name__}")
    policy: Policy = found
    return policy


def acts_on(name: str) -> str:
    """What the multipliers of a policy multiply: `learning_rate` or `weight_decay`.

    Raises:
        ValueError: if the policy cannot be loaded, or says something else.
    """
    if name in POLICIES:
        return POLICIES[name].acts_on
    target: str = getattr(load_policy(name), "acts_on", LEARNING_RATE)
    if target not in ACTS_ON:
        raise _refused(name, f"acts_on = {target!r}, of {' and '.join(ACTS_ON)}")
    return target


def held_at_one(matrices: Iterable[MatrixId], config: LLRConfig) -> frozenset[MatrixId]:
    """Matrices whose multiplier is 1 under any policy, and that are not passed to policies."""
    if config.router != "one":
        return frozenset()
    return frozenset(matrix for matrix in matrices if matrix.role == ROUTER)


def targets_for(alphas: Mapping[MatrixId, float], config: LLRConfig) -> dict[MatrixId, float]:
    """Targets that `config.policy` gives; a matrix left out keeps its multiplier.

    Factors of `config.role_factors` are applied after the policy.

    Raises:
        ValueError: if a user's own policy fails, or gives what is no multiplier; or if there are
            factors for roles that no matrix has.
    """
    held = held_at_one(alphas, config)
    asked = {matrix: alpha for matrix, alpha in alphas.items() if matrix not in held}
    targets = {**_ask(asked, config), **dict.fromkeys(held, 1.0)}
    factors = config.factors_by_role()
    roles = list(dict.fromkeys(matrix.role for matrix in alphas))
    absent = sorted(factors.keys() - set(roles))
    if absent:
        raise input_error(
            f"{flag('role_factors')} names roles that the model does not have: "
            f"{', '.join(absent)}. Its roles are {', '.join(roles)}. Set {flag('role_factors')} to "
            "factors of these."
        )
    return {matrix: target * factors.get(matrix.role, 1.0) for matrix, target in targets.items()}


def _ask(alphas: Mapping[MatrixId, float], config: LLRConfig) -> dict[MatrixId, float]:
    policy = load_policy(config.policy)
    if config.policy in POLICIES:
        return dict(policy(alphas, config))
    try:
        targets = {matrix: float(value) for matrix, value in policy(dict(alphas), config).items()}
    except Exception as failed:  # someone else's code: any error of it is one about the policy
        raise _refused(config.policy, f"{type(failed).__name__}: {failed}") from failed
    for matrix, value in targets.items():
        if matrix not in alphas or not (math.isfinite(value) and value > 0):
            raise _refused(config.policy, f"{matrix}: {value}, no matrix or no number above 0")
    return {matrix: targets[matrix] for matrix in alphas if matrix in targets}
