"""Every setting of the extension; the docstring of a field is the help text of its flag."""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, get_args, get_origin

from megatron_llr.errors import input_error
from megatron_llr.matrices.ids import ROLES
from megatron_llr.matrices.info import MIN_EIGENVALUES
from megatron_llr.policy_table import POLICIES, names_a_function

LLR_TABLE = "llr"
"""Value of `role_table` that names the constants that LLR converged to instead of a file."""

Estimator = Literal["hill_median", "ks", "fix_finger"]
ModelMapping = Literal["linear", "quantile", "sqrt", "log2", "sigmoid", "rank"]
BlockMapping = Literal[
    "block-linear", "block-quantile", "block-sqrt", "block-log2", "block-sigmoid", "block-rank"
]
MappingName = Literal[ModelMapping, BlockMapping]
Granularity = Literal["projection", "parameter", "role", "block"]
DecayMode = Literal["coupled", "decoupled"]
StepWay = Literal["auto", "fused", "grouped"]
EmbeddingPolicy = Literal["max", "one", "measured"]
RouterPolicy = Literal["one", "policy"]
SpectrumMode = Literal["exact", "sharded", "farms"]
SpectrumSource = Literal["model", "master"]
LogMatrices = Literal["all", "roles"]

ESTIMATORS: tuple[Estimator, ...] = get_args(Estimator)

Kind = Literal["meaning", "changeable", "window", "unsaved", "start", "local"]
"""Whether a setting is saved in a checkpoint and may differ between ranks: metadata of every field.

meaning: saved; a resumed run with another value is refused, because the saved multipliers would
    mean something else.
changeable: saved; a resumed run may have another value, which applies from then on.
window: saved; a resumed run keeps the saved value and reports that it ignores another one.
unsaved: not saved.
start: not saved; affects only how a run starts.
local: not saved; may differ between ranks.
"""
_MEANING: dict[str, Kind] = {"kind": "meaning"}
_CHANGEABLE: dict[str, Kind] = {"kind": "changeable"}
_WINDOW: dict[str, Kind] = {"kind": "window"}
_UNSAVED: dict[str, Kind] = {"kind": "unsaved"}
START: dict[str, Kind] = {"kind": "start"}
_LOCAL: dict[str, Kind] = {"kind": "local"}


def flag(field: str) -> str:
    """The command-line flag of a setting."""
    return "--llr-" + field.replace("_", "-")


def _positive(value: float) -> bool:
    return math.isfinite(value) and value > 0


_BOUNDS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "min_multiplier": (_positive, "a finite number above 0"),
    "max_multiplier": (_positive, "a finite number above 0"),
    "interval": (lambda n: n >= 1, "a whole number of at least 1"),
    "ramp_iters": (lambda n: n >= 0, f"a whole number from 0, less than {flag('interval')}"),
    "active_fraction": (lambda x: 0 < x <= 1, "above 0 and at most 1"),
    "active_iters": (lambda n: n is None or n >= 1, "a whole number of at least 1"),
    "quantile": (lambda x: 0 <= x < 0.5, "at least 0 and less than 0.5"),
    "depth_floor": (lambda x: 0 < x <= 1, "above 0 and at most 1"),
    "farms_rows": (
        lambda n: n >= MIN_EIGENVALUES,
        f"a whole number of at least {MIN_EIGENVALUES}",
    ),
    "farms_windows": (lambda n: n >= 1, "a whole number of at least 1"),
    "measure_memory": (_positive, "a finite number of GB above 0"),
}
"""Setting -> whether a value is valid, and the valid values in words."""


@dataclass(frozen=True, kw_only=True)
class LLRConfig:
    """Layerwise learning rates: how spectra become multipliers, and when."""

    policy: str = field(default="esd", metadata=_MEANING)
    """How every matrix gets its multiplier: POLICIES; or package.module:function, a function of
    your own."""

    min_multiplier: float = field(default=1.0, metadata=_MEANING)
    """Multiplier of the matrix with the heaviest tail."""

    max_multiplier: float = field(default=5.0, metadata=_MEANING)
    """Multiplier of the matrix with the weakest tail."""

    interval: int = field(default=100, metadata=_CHANGEABLE)
    """Updates from one measurement to the next."""

    ramp_iters: int = field(default=50, metadata=_CHANGEABLE)
    """Updates over which multipliers move to their new targets; less than --llr-interval."""

    active_fraction: float = field(default=0.2, metadata=_WINDOW)
    """Share of the training iterations in which measurements are made; then multipliers freeze."""

    active_iters: int | None = field(default=None, metadata=_WINDOW)
    """Last update that a measurement may precede, instead of --llr-active-fraction."""

    estimator: Estimator = field(default="hill_median", metadata=_MEANING)
    """Tail exponent: hill_median (that of the published results), ks or fix_finger."""

    mapping: MappingName = field(default="linear", metadata=_MEANING)
    """How exponents become multipliers: linear between the smallest and the largest exponent (as
    published), quantile (the same between two quantiles), rank, or relative to the mean: sqrt,
    log2, sigmoid. With block- before it (block-linear) each block is mapped by itself."""

    inverse: bool = field(default=False, metadata=_MEANING)
    """Reverse the direction: the heaviest tail, or with a depth policy the last block, gets the
    largest multiplier."""

    quantile: float = field(default=0.05, metadata=_MEANING)
    """Share of the exponents clipped at either end by the quantile mappings."""

    mean_preserving: bool = field(default=False, metadata=_MEANING)
    """Divide the multipliers by their mean, so that the mean over all matrices except embedding and
    head is 1. The multiplier that --llr-embedding gives those two is not divided; one from a
    policy's own table or formula is."""

    granularity: Granularity = field(default="projection", metadata=_MEANING)
    """Which matrices share a multiplier: projection (none: q, k, v, gate and up each have their
    own), those of a Megatron parameter, of a role over all blocks, or of a block. They get the mean
    of their multipliers, weighted by size."""

    role_table: str | None = field(default=None, metadata=_MEANING)
    """JSON or YAML file of the policy fixed: pattern -> multiplier, or a mapping with multiplier
    and weight_decay, a factor on the weight decay. Patterns are roles (q), matrix ids, or ids with
    wildcards (block.*.attention.k, block.{0,1}.mlp.*). The first that matches a matrix counts; a
    matrix without one keeps 1. Multiplier 0 freezes a matrix. Or the name of a table of this
    package: llr (the constants that LLR converged to), modded-nanogpt, mup-width-4, llrd-0.8-12."""

    role_factors: str | None = field(default=None, metadata=_MEANING)
    """Factors on the multipliers of single roles, after the policy: down=0.7 or q=0.7,k=0.7. A
    router gets its factor too. --llr-mean-preserving does not divide by them."""

    depth_floor: float = field(default=0.1, metadata=_MEANING)
    """Smallest multiplier of the depth policies, that of the last block (--llr-inverse: the
    first)."""

    random_seed: int = field(default=0, metadata=_MEANING)
    """Seed of the permutation of the policy random."""

    weight_decay: DecayMode = field(default="coupled", metadata=_CHANGEABLE)
    """coupled: decay scales with the multiplier, as AdamW multiplies it by the learning rate.
    decoupled: every matrix decays as at multiplier 1."""

    step: StepWay = field(default="auto", metadata=_UNSAVED)
    """How an optimizer steps each matrix at its own learning rate. fused: all of them in one kernel
    launch, for Adam with fp32 weights and moments on CUDA. grouped: in param groups, for every
    element-wise optimizer. auto: fused where the optimizer supports it, else grouped."""

    hyperball: bool = field(default=False, metadata=_MEANING)
    """Step the matrices of the blocks and the head on spheres: each keeps its Frobenius norm, and
    its learning rate is the relative size of the step (AdamH with --optimizer adam, MuonH with
    --optimizer muon). Embeddings, routers, norms, biases and matrices that start at zero stay with
    the plain optimizer. The head's multiplier is 1 unless --llr-embedding is measured or a role
    table names it."""

    hyperball_lr: float | None = field(default=None, metadata=_CHANGEABLE)
    """Largest learning rate of --llr-hyperball; it follows the schedule of --lr. Default: 13/3 of
    --lr."""

    embedding: str = field(default="max", metadata=_MEANING)
    """Multiplier of embedding and head: max (that of --llr-max-multiplier, as published), one,
    measured (from their own spectra), or a number."""

    router: RouterPolicy = field(default="one", metadata=_MEANING)
    """Multiplier of the routers of a mixture of experts, whose spectra are always measured: one,
    with the routers left out when exponents are compared, or policy (the multiplier that
    --llr-policy gives them, like any other matrix)."""

    spectrum: SpectrumMode = field(default="exact", metadata=_MEANING)
    """exact: the spectrum of the whole matrix, the same on every layout. sharded: the pooled
    singular values of its tensor-parallel shards; cheaper, biased, depends on the layout. farms:
    the pooled spectra of square submatrices of the whole matrix (FARMS, arXiv 2506.06280), so that
    the exponent does not depend on its aspect ratio; more expensive, the same on every layout."""

    spectrum_source: SpectrumSource = field(default="model", metadata=_MEANING)
    """Weights that are measured. model: those that the model computes with; quantised ones are
    dequantised. master: the optimizer's fp32 copies, gathered for the measurement, which needs
    memory for a rank's share of them."""

    farms_rows: int = field(default=2000, metadata=_MEANING)
    """Side of the submatrices of --llr-spectrum farms, or the matrix's shorter side if less."""

    farms_windows: int = field(default=10, metadata=_MEANING)
    """Submatrices of --llr-spectrum farms along each side of a matrix, evenly spaced."""

    measure_memory: float = field(default=4.0, metadata=_UNSAVED)
    """GB that the spectra of a batch of matrices may take on a GPU, where matrices of equal smaller
    side are solved together. One matrix and its Gram matrix may exceed it. A CPU solves them one by
    one."""

    log_dir: str | None = field(default=None, metadata=_LOCAL)
    """Folder for measurements.csv and learning_rates.csv; without it they are not written."""

    log_relative_update: bool = field(default=False, metadata=_UNSAVED)
    """At every --log-interval also log the relative update of every matrix: the norm of the change
    over the norm of the weights. Costs a copy of the weights that a rank's optimizer steps (4 bytes
    each in fp32) during such an update."""

    log_matrices: LogMatrices = field(default="all", metadata=_UNSAVED)
    """Rows of the CSV files, curves, and lines of --llr-dry-run: all (one per matrix) or roles (one
    per role and block: the experts of a block by mean, minimum and maximum; singular values are not
    kept), for models with thousands of experts."""

    skip_unknown: bool = field(default=False, metadata=_UNSAVED)
    """Train weights that this package cannot name at multiplier 1 and list them, instead of
    refusing the model."""

    reset_state: bool = field(default=False, metadata=START)
    """Ignore the extension's state in the checkpoint and start the multipliers again from 1."""

    def __post_init__(self) -> None:
        """Check every value; a wrong one is a ValueError that names its flag."""
        if self.policy not in POLICIES and not names_a_function(self.policy):
            allowed = f"one of {', '.join(POLICIES)}, or package.module:function"
            raise _invalid("policy", self.policy, allowed)
        check_choices(self)
        for name, (is_valid, allowed) in _BOUNDS.items():
            if not is_valid(getattr(self, name)):
                raise _invalid(name, getattr(self, name), allowed)
        if self.min_multiplier > self.max_multiplier:
            allowed = f"at most {flag('max_multiplier')}, which is {self.max_multiplier}"
            raise _invalid("min_multiplier", self.min_multiplier, allowed)
        if self.ramp_iters >= self.interval:
            # A ramp that outlasts the interval would never reach its target.
            allowed = f"from 0 to {self.interval - 1}, less than {flag('interval')}"
            raise _invalid("ramp_iters", self.ramp_iters, allowed)
        if self.policy == "fixed" and self.role_table is None:
            raise input_error(
                f"{flag('policy')} fixed needs a table of multipliers. Set {flag('role_table')} to "
                f"a file or to {LLR_TABLE}."
            )
        if self.policy != "fixed" and self.role_table is not None:
            raise input_error(
                f"{flag('role_table')} {self.role_table} has no effect with {flag('policy')} "
                f"{self.policy}. Use {flag('policy')} fixed, or leave {flag('role_table')} out."
            )
        if self.factors_by_role() and self.policy == "alphadecay":
            allowed = f"no factors with {flag('policy')} alphadecay, which sets the weight decay"
            raise _invalid("role_factors", self.role_factors, allowed)
        if self.policy == "shape" and (self.estimator, self.spectrum) != ("hill_median", "exact"):
            # The other exponents of random matrices scatter by half of their mean (measured), and
            # FARMS spectra do not depend on the shape.
            exact = f"{flag('estimator')} hill_median and {flag('spectrum')} exact"
            allowed = f"another one, or used with {exact}"
            raise _invalid("policy", self.policy, allowed)
        if self.policy == "embedding-only" and self.embedding == "measured":
            allowed = f"max, one, or a number with {flag('policy')} embedding-only"
            raise _invalid("embedding", self.embedding, allowed)
        if self.hyperball_lr is not None:
            rate = self.hyperball_lr
            if not self.hyperball:
                raise _invalid("hyperball_lr", rate, f"none without {flag('hyperball')}")
            if not 0 < rate < 1:
                raise _invalid("hyperball_lr", rate, "above 0, below 1: it is a relative step")
        if self.hyperball and self.policy == "alphadecay":
            raise _invalid(
                "policy", self.policy, f"one that sets learning rates, with {flag('hyperball')}"
            )
        if self.policy == "alphadecay" and self.weight_decay == "decoupled":
            allowed = f"coupled with {flag('policy')} alphadecay, which sets the decay itself"
            raise _invalid("weight_decay", self.weight_decay, allowed)
        self.embedding_multiplier()

    def embedding_multiplier(self) -> float | None:
        """Multiplier that `embedding` fixes for embedding and head, or None if it is measured.

        Raises:
            ValueError: if `embedding` is neither one of the names nor a positive finite number.
        """
        fixed = {"max": self.max_multiplier, "one": 1.0, "measured": None}
        if self.embedding in fixed:
            return fixed[self.embedding]
        try:
            value = float(self.embedding)
        except ValueError:
            value = math.nan
        if not _positive(value):
            allowed = f"one of {', '.join(get_args(EmbeddingPolicy))}, or a finite number above 0"
            raise _invalid("embedding", self.embedding, allowed)
        return value

    def factors_by_role(self) -> dict[str, float]:
        """Role -> factor on its multipliers, from `role_factors`.

        Raises:
            ValueError: if it is no list of known roles with finite numbers above 0.
        """
        factors: dict[str, float] = {}
        for pair in (self.role_factors or "").split(",") if self.role_factors is not None else ():
            role, _, text = pair.strip().partition("=")
            try:
                value = float(text)
            except ValueError:
                value = math.nan
            if role not in ROLES or role in factors or not (math.isfinite(value) and value > 0):
                allowed = f"role=factor,... with factors above 0 and roles of {', '.join(ROLES)}"
                raise _invalid("role_factors", self.role_factors, allowed)
            factors[role] = value
        return factors

    def meaning(self) -> dict[str, Any]:
        """The settings that give saved state its meaning, as plain JSON values."""
        return {name: getattr(self, name) for name in settings_of(LLRConfig, "meaning")}

    def timing(self) -> dict[str, Any]:
        """The settings that are saved and may change between runs, as plain JSON values."""
        saved = settings_of(LLRConfig, "changeable", "window")
        return {name: getattr(self, name) for name in saved}


def settings_of(config_type: type[Any], *kinds: Kind) -> tuple[str, ...]:
    """Names of the settings of the given kinds, in the order of the fields."""
    return tuple(each.name for each in fields(config_type) if each.metadata["kind"] in kinds)


def shared_settings(config: Any) -> dict[str, Any]:
    """Flag -> value of all settings that must be the same on every rank."""
    local = settings_of(type(config), "local")
    return {flag(name): value for name, value in asdict(config).items() if name not in local}


def check_choices(config: Any) -> None:
    """Refuse a value that the `Literal` of its field does not have."""
    for each in fields(config):
        value = getattr(config, each.name)
        if get_origin(each.type) is Literal and value not in get_args(each.type):
            raise _invalid(each.name, value, f"one of {', '.join(get_args(each.type))}")


def _invalid(field: str, value: object, allowed: str) -> ValueError:
    return input_error(f"{flag(field)} {value} is not valid. It must be {allowed}.")
