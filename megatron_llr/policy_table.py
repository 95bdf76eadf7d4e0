"""The policies by name: one row each. What a row names is imported when it is used."""

from dataclasses import dataclass

LEARNING_RATE = "learning_rate"
WEIGHT_DECAY = "weight_decay"
ACTS_ON = (LEARNING_RATE, WEIGHT_DECAY)


@dataclass(frozen=True, slots=True)
class PolicyRow:
    """A policy.

    Attributes:
        path: its function, as `module:name` (`megatron_llr.policies.registry.Policy`).
        summary: a few words for `--help`.
        acts_on: what the multipliers multiply: `learning_rate` or `weight_decay`.
        mapped: whether `--llr-mapping` and its bounds turn exponents into the multipliers.
        of_shape: whether it gets the exponents of random matrices of the same shapes instead of the
            measured ones.
        sets_small: whether it also sets matrices with too few eigenvalues to be measured.
    """

    path: str
    summary: str
    acts_on: str = LEARNING_RATE
    mapped: bool = False
    of_shape: bool = False
    sets_small: bool = False


_HERE = "megatron_llr.policies."

POLICIES: dict[str, PolicyRow] = {
    "esd": PolicyRow(
        _HERE + "assign:assign_multipliers",
        "LLR, arXiv 2605.22297: heavier tail, smaller rate",
        mapped=True,
    ),
    "uniform": PolicyRow(
        _HERE + "constant:uniform", "every multiplier 1, spectra still measured: the control run"
    ),
    "embedding-only": PolicyRow(
        _HERE + "constant:embedding_only", "embedding and head at --llr-embedding, the others at 1"
    ),
    "fixed": PolicyRow(
        _HERE + "constant:fixed",
        "multipliers by role or matrix id, from --llr-role-table",
        sets_small=True,
    ),
    "blockwise": PolicyRow(_HERE + "blockwise:blockwise", "ratios by sharpness, arXiv 2502.19002"),
    "depth-linear": PolicyRow(_HERE + "depth:linear", "1 at the first block, falling linearly"),
    "depth-exponential": PolicyRow(_HERE + "depth:exponential", "the same, exponentially"),
    "depth-cosine": PolicyRow(_HERE + "depth:cosine", "the same, along half a cosine"),
    "random": PolicyRow(
        _HERE + "shuffled:random",
        "the multipliers of esd, permuted (--llr-random-seed)",
        mapped=True,
    ),
    "inverse": PolicyRow(
        _HERE + "shuffled:inverse", "esd turned round: heavier tail, larger rate", mapped=True
    ),
    "shape": PolicyRow(
        _HERE + "assign:assign_multipliers",
        "esd with the expected exponents of random matrices of the same shapes",
        mapped=True,
        of_shape=True,
    ),
    "role-mean": PolicyRow(
        _HERE + "role_mean:role_mean",
        "the multipliers of esd, averaged over the matrices of each role",
        mapped=True,
    ),
    "alphadecay": PolicyRow(
        _HERE + "alphadecay:alphadecay",
        "arXiv 2506.14562: heavier tail, smaller weight decay; rates stay as they are",
        WEIGHT_DECAY,
        mapped=True,
    ),
}


def row_of(policy: str) -> PolicyRow:
    """The row of a policy; for a user's own function a row of the defaults."""
    return POLICIES.get(policy) or PolicyRow(policy, "a function of the user")


def names_a_function(policy: str) -> bool:
    """Whether a policy is a user's own, named by import path (`package.module:function`)."""
    module, _, function = policy.partition(":")
    return bool(module and function) and all(
        part.isidentifier() for part in [*module.split("."), *function.split(".")]
    )


def summaries() -> str:
    """The names with their summaries, for `--help`."""
    return "; ".join(f"{name} ({row.summary})" for name, row in POLICIES.items())
