"""Every setting of the extension; the docstring of a field is the help text of its flag."""

import math
from dataclasses import asdict, dataclass
from typing import Any

from megatron_llr.errors import user_error

POLICIES = ("esd", "uniform", "fixed")
ESTIMATORS = ("hill_median", "ks", "fix_finger")
_MAPPINGS = ("linear", "quantile", "sqrt", "log2", "sigmoid", "rank")
MAPPINGS = (*_MAPPINGS, *(f"block-{mapping}" for mapping in _MAPPINGS))
GRANULARITIES = ("projection", "parameter", "role", "block")
WEIGHT_DECAYS = ("coupled", "decoupled")
EMBEDDING_POLICIES = ("max", "one", "measured")
SPECTRA = ("exact", "sharded")
DEVICES = ("auto", "cuda", "cpu")

# Fields that give a saved state its meaning; the rest may change between runs.
MEANINGFUL = (
    "policy",
    "min_multiplier",
    "max_multiplier",
    "estimator",
    "mapping",
    "inverse",
    "quantile",
    "mean_preserving",
    "role_table",
    "granularity",
    "embedding",
    "spectrum",
)
# Fields that only say when; a change holds from the next measurement on.
TIMING = ("interval", "ramp_iters", "active_fraction", "active_iters", "weight_decay")


def flag(field: str) -> str:
    """The command-line flag of a field of `LLRConfig`."""
    return "--llr-" + field.replace("_", "-")


@dataclass(frozen=True, kw_only=True)
class LLRConfig:
    """Layerwise learning rates: how spectra become multipliers, and when."""

    policy: str = "esd"
    """What gives every matrix its multiplier: esd (LLR, arXiv 2605.22297: heavier tail, smaller
    rate), uniform (every multiplier 1, spectra still measured: the control run), or fixed (one
    multiplier per role, from --llr-role-table)."""

    min_multiplier: float = 1.0
    """Multiplier of the matrix with the heaviest tail."""

    max_multiplier: float = 5.0
    """Multiplier of the matrix with the weakest tail."""

    interval: int = 100
    """Updates from one measurement to the next."""

    ramp_iters: int = 50
    """Updates over which multipliers move to their new targets; less than --llr-interval."""

    active_fraction: float = 0.2
    """Share of the training iterations in which measurements are made; then multipliers freeze."""

    active_iters: int | None = None
    """Last update that a measurement may precede, instead of --llr-active-fraction."""

    estimator: str = "hill_median"
    """Tail exponent: hill_median (that of the published results), ks or fix_finger."""

    mapping: str = "linear"
    """How exponents become multipliers: linear between the smallest and the largest exponent (as
    published), quantile (the same between two quantiles), rank, or relative to the mean: sqrt,
    log2, sigmoid. With block- before it (block-linear) each block is mapped by itself."""

    inverse: bool = False
    """Turn the direction round: the heaviest tail gets the largest multiplier."""

    quantile: float = 0.05
    """Share of the exponents clipped at either end by the quantile mappings."""

    mean_preserving: bool = False
    """Divide the multipliers by their mean, so that the mean over all matrices but embedding and
    head is 1."""

    granularity: str = "projection"
    """What shares a multiplier: projection (nothing: q, k, v, gate, up each its own), a Megatron
    parameter, a role over all blocks, or a block. The matrices that share get the mean of their
    multipliers, weighted by size."""

    role_table: str | None = None
    """JSON file of the policy fixed: role -> multiplier, as {"q": 1.2, "head": 5}; roles that it
    does not name, embedding and head among them, keep 1."""

    weight_decay: str = "coupled"
    """coupled: decay scales with the multiplier, as AdamW multiplies it by the learning rate.
    decoupled: every matrix decays as at multiplier 1."""

    embedding: str = "max"
    """Multiplier of embedding and head: max (that of --llr-max-multiplier, as published), one,
    measured (from their own spectra), or a number."""

    spectrum: str = "exact"
    """exact: the spectrum of the whole matrix, the same on every layout. sharded: the pooled
    singular values of its tensor-parallel shards; cheaper, biased, depends on the layout."""

    log_dir: str | None = None
    """Folder for measurements.csv and learning_rates.csv; none are written without it."""

    log_relative_update: bool = False
    """At every --log-interval also log the relative update of every matrix: the norm of what the
    update changed over the norm of the weights. Costs a copy of the weights that a rank's optimizer
    steps (4 bytes each in fp32), for the duration of such an update."""

    dry_run: bool = False
    """Print every matrix with its shape, owner and starting multiplier, then stop."""

    reset_state: bool = False
    """Ignore the extension's state in the checkpoint and start the multipliers afresh."""

    device: str = "auto"
    """Where the job runs: auto (cuda where there is a GPU), cuda or cpu."""

    def __post_init__(self) -> None:
        """Check every value; a wrong one is a ValueError that names its flag."""
        self._check_choices()
        self._check_multipliers()
        self._check_timing()
        self.embedding_multiplier()

    def _check_choices(self) -> None:
        choices = {
            "policy": POLICIES,
            "estimator": ESTIMATORS,
            "mapping": MAPPINGS,
            "granularity": GRANULARITIES,
            "weight_decay": WEIGHT_DECAYS,
            "spectrum": SPECTRA,
            "device": DEVICES,
        }
        for field, allowed in choices.items():
            value = getattr(self, field)
            if value not in allowed:
                raise _bad(field, value, ", ".join(allowed))

    def _check_multipliers(self) -> None:
        for field in ("min_multiplier", "max_multiplier"):
            value = getattr(self, field)
            if not (math.isfinite(value) and value > 0):
                raise _bad(field, value, "a finite number above 0")
        if self.min_multiplier > self.max_multiplier:
            raise _bad(
                "min_multiplier",
                self.min_multiplier,
                f"at most {flag('max_multiplier')} {self.max_multiplier}",
            )

        if (self.role_table is not None) != (self.policy == "fixed"):
            raise _bad("role_table", self.role_table, f"a file, with {flag('policy')} fixed alone")
        if not 0 <= self.quantile < 0.5:
            raise _bad("quantile", self.quantile, "0 up to, not including, 0.5")

    def _check_timing(self) -> None:
        if self.interval < 1:
            raise _bad("interval", self.interval, "a whole number from 1")
        if not 0 <= self.ramp_iters < self.interval:
            # A ramp that outlasts the interval would never reach its target.
            raise _bad(
                "ramp_iters", self.ramp_iters, f"0 to {flag('interval')} - 1 = {self.interval - 1}"
            )
        if not 0 < self.active_fraction <= 1:
            raise _bad("active_fraction", self.active_fraction, "above 0, at most 1")
        if self.active_iters is not None and self.active_iters < 1:
            raise _bad("active_iters", self.active_iters, "a whole number from 1")

    def embedding_multiplier(self) -> float | None:
        """Multiplier that `embedding` fixes for embedding and head, or None where it is measured.

        Raises:
            ValueError: if `embedding` is neither a known word nor a positive finite number.
        """
        fixed = {"max": self.max_multiplier, "one": 1.0, "measured": None}
        if self.embedding in fixed:
            return fixed[self.embedding]
        try:
            value = float(self.embedding)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and value > 0):
            allowed = ", ".join(EMBEDDING_POLICIES) + ", or a finite number above 0"
            raise _bad("embedding", self.embedding, allowed)
        return value

    def meaning(self) -> dict[str, Any]:
        """The fields that give saved state its meaning, as plain JSON values."""
        values = asdict(self)
        return {field: values[field] for field in MEANINGFUL}

    def timing(self) -> dict[str, Any]:
        """The fields that may change between runs, as plain JSON values."""
        values = asdict(self)
        return {field: values[field] for field in TIMING}


def _bad(field: str, got: object, allowed: str) -> ValueError:
    return user_error(f"bad {flag(field)}", got=got, allowed=allowed, remedy=f"set {flag(field)}")
