"""Every setting of the extension; the docstring of a field is the help text of its flag."""

import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, get_args, get_origin

from megatron_llr.errors import user_error
from megatron_llr.matrices.ids import ROLES
from megatron_llr.matrices.info import MIN_EIGENVALUES
from megatron_llr.policy_table import POLICIES, names_a_function

LLR_TABLE = "llr"
"""Value of `role_table` that names the built-in constants instead of a file."""

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
DeviceName = Literal["auto", "cuda", "cpu"]

ESTIMATORS: tuple[Estimator, ...] = get_args(Estimator)

Kind = Literal["meaning", "changeable", "window", "unsaved", "start", "local"]
"""What a setting is to a saved state and to the other ranks: metadata of every field.

meaning: gives the saved state its meaning; another value is refused when a run is resumed.
changeable: another value holds from the resume on.
window: the saved window holds; another value is reported as not taken.
unsaved: not part of the saved state.
start: only says how a run starts; not part of the saved state.
local: may differ between ranks; not part of the saved state.
"""
_MEANING: dict[str, Kind] = {"kind": "meaning"}
_CHANGEABLE: dict[str, Kind] = {"kind": "changeable"}
_WINDOW: dict[str, Kind] = {"kind": "window"}
_UNSAVED: dict[str, Kind] = {"kind": "unsaved"}
_START: dict[str, Kind] = {"kind": "start"}
_LOCAL: dict[str, Kind] = {"kind": "local"}


def flag(field: str) -> str:
    """The command-line flag of a setting."""
    return "--llr-" + field.replace("_", "-")


@dataclass(frozen=True, kw_only=True)
class LLRConfig:
    """Layerwise learning rates: how spectra become multipliers, and when."""

    policy: str = field(default="esd", metadata=_MEANING)
    """What gives every matrix its multiplier: POLICIES; or package.module:function, a function of
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
    """Turn the direction round: the heaviest tail, or with a depth policy the last block, gets the
    largest multiplier."""

    quantile: float = field(default=0.05, metadata=_MEANING)
    """Share of the exponents clipped at either end by the quantile mappings."""

    mean_preserving: bool = field(default=False, metadata=_MEANING)
    """Divide the multipliers by their mean, so that the mean over all matrices but embedding and
    head is 1. What --llr-embedding gives those two is not divided; what a policy's own table or
    formula gives them is."""

    granularity: Granularity = field(default="projection", metadata=_MEANING)
    """What shares a multiplier: projection (nothing: q, k, v, gate, up each its own), a Megatron
    parameter, a role over all blocks, or a block. The matrices that share get the mean of their
    multipliers, weighted by size."""

    role_table: str | None = field(default=None, metadata=_MEANING)
    """JSON file of the policy fixed: role -> multiplier, as {"q": 1.2, "head": 5}; roles that it
    does not name, embedding and head among them, keep 1. Or llr: the constants that LLR converged
    to."""

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
    """How an optimizer steps its matrices at rates of their own. fused: all of them in one kernel
    launch, for Adam with fp32 weights and moments on CUDA. grouped: in param groups, for every
    element-wise optimizer. auto: fused where the optimizer can, else grouped."""

    embedding: str = field(default="max", metadata=_MEANING)
    """Multiplier of embedding and head: max (that of --llr-max-multiplier, as published), one,
    measured (from their own spectra), or a number."""

    router: RouterPolicy = field(default="one", metadata=_MEANING)
    """Multiplier of the routers of a mixture of experts, whose spectra are measured in any case:
    one, with the router left out when exponents are compared, or policy (what --llr-policy gives
    it, as one matrix among the others)."""

    spectrum: SpectrumMode = field(default="exact", metadata=_MEANING)
    """exact: the spectrum of the whole matrix, the same on every layout. sharded: the pooled
    singular values of its tensor-parallel shards; cheaper, biased, depends on the layout. farms:
    the pooled spectra of square submatrices of the whole matrix (FARMS, arXiv 2506.06280), so that
    the exponent does not depend on its aspect ratio; dearer, the same on every layout."""

    spectrum_source: SpectrumSource = field(default="model", metadata=_MEANING)
    """Weights that are measured. model: those that the model computes with, quantised ones
    dequantised. master: the optimizer's fp32 copies, gathered for the measurement, which then takes
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
    """Folder for measurements.csv and learning_rates.csv; none are written without it."""

    log_relative_update: bool = field(default=False, metadata=_UNSAVED)
    """At every --log-interval also log the relative update of every matrix: the norm of what the
    update changed over the norm of the weights. Costs a copy of the weights that a rank's optimizer
    steps (4 bytes each in fp32), for the duration of such an update."""

    log_matrices: LogMatrices = field(default="all", metadata=_UNSAVED)
    """What has rows in the CSV files, curves, and a line of --llr-dry-run: all (every matrix by
    itself) or roles (every role of every block: the experts of a block by mean, minimum and
    maximum; singular values are not kept). For models of thousands of experts."""

    skip_unknown: bool = field(default=False, metadata=_UNSAVED)
    """Train weights that this package cannot name at multiplier 1, and say which, instead of
    refusing the model."""

    reset_state: bool = field(default=False, metadata=_START)
    """Ignore the extension's state in the checkpoint and start the multipliers afresh."""

    def __post_init__(self) -> None:
        """Check every value; a wrong one is a ValueError that names its flag."""
        if self.policy not in POLICIES and not names_a_function(self.policy):
            raise _bad("policy", self.policy, f"{', '.join(POLICIES)}, or package.module:function")
        _check_choices(self)
        self._check_multipliers()
        self._check_windows()
        self._check_timing()
        self.embedding_multiplier()

    def _check_multipliers(self) -> None:
        for name in ("min_multiplier", "max_multiplier"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise _bad(name, value, "a finite number above 0")
        if self.min_multiplier > self.max_multiplier:
            raise _bad(
                "min_multiplier",
                self.min_multiplier,
                f"at most {flag('max_multiplier')} {self.max_multiplier}",
            )

        if (self.role_table is not None) != (self.policy == "fixed"):
            allowed = f"a file or {LLR_TABLE}, with {flag('policy')} fixed alone"
            raise _bad("role_table", self.role_table, allowed)
        if self.factors_by_role() and self.policy == "alphadecay":
            allowed = f"no factors with {flag('policy')} alphadecay, which sets the weight decay"
            raise _bad("role_factors", self.role_factors, allowed)
        if self.policy == "shape" and (self.estimator, self.spectrum) != ("hill_median", "exact"):
            # The other exponents of random matrices scatter by half of their mean (measured), and
            # FARMS spectra do not depend on the shape.
            allowed = f"with {flag('estimator')} hill_median and {flag('spectrum')} exact only"
            raise _bad("policy", self.policy, allowed)
        if not 0 <= self.quantile < 0.5:
            raise _bad("quantile", self.quantile, "0 up to, not including, 0.5")
        if not 0 < self.depth_floor <= 1:
            raise _bad("depth_floor", self.depth_floor, "above 0, at most 1")
        if self.policy == "embedding-only" and self.embedding == "measured":
            allowed = f"max, one, or a number with {flag('policy')} embedding-only"
            raise _bad("embedding", self.embedding, allowed)
        if self.policy == "alphadecay" and self.weight_decay == "decoupled":
            allowed = f"coupled with {flag('policy')} alphadecay, which sets the decay itself"
            raise _bad("weight_decay", self.weight_decay, allowed)

    def _check_windows(self) -> None:
        if self.farms_rows < MIN_EIGENVALUES:
            raise _bad("farms_rows", self.farms_rows, f"a whole number from {MIN_EIGENVALUES}")
        if self.farms_windows < 1:
            raise _bad("farms_windows", self.farms_windows, "a whole number from 1")

        if not (math.isfinite(self.measure_memory) and self.measure_memory > 0):
            raise _bad("measure_memory", self.measure_memory, "a finite number of GB above 0")

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
            allowed = ", ".join(get_args(EmbeddingPolicy)) + ", or a finite number above 0"
            raise _bad("embedding", self.embedding, allowed)
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
                raise _bad("role_factors", self.role_factors, allowed)
            factors[role] = value
        return factors

    def meaning(self) -> dict[str, Any]:
        """The settings that give saved state its meaning, as plain JSON values."""
        return {name: getattr(self, name) for name in settings_of(LLRConfig, "meaning")}

    def timing(self) -> dict[str, Any]:
        """The settings that are saved and may change between runs, as plain JSON values."""
        saved = settings_of(LLRConfig, "changeable", "window")
        return {name: getattr(self, name) for name in saved}


@dataclass(frozen=True, kw_only=True)
class ScriptConfig:
    """The pretraining script: where it runs and how it starts."""

    dry_run: bool = field(default=False, metadata=_START)
    """Print every matrix with its shape, owner and starting multiplier, then stop."""

    explain: str | None = field(default=None, metadata=_START)
    """Id of a matrix, as block.3.attention.q. Before the first update, print why it has its
    learning rate: shards, exponent, policy, target, ramp, base learning rate, weight decay. With
    --llr-dry-run and --load: of the run that saved the checkpoint."""

    same_start: bool = field(default=False, metadata=_START)
    """Initial weights that depend on --seed alone: every matrix is drawn whole, so that a run on
    another layout begins at the same weights. Without it they are Megatron's own. Of the
    pretraining script alone, like the next."""

    fixed_validation: bool = field(default=False, metadata=_START)
    """Every evaluation on the same validation samples, whatever --seed: the first --eval-iters
    batches in an order of their own. Without it Megatron goes on to other samples each time."""

    device: DeviceName = field(default="auto", metadata=_START)
    """Where the job runs: auto (cuda where there is a GPU), cuda or cpu."""

    def __post_init__(self) -> None:
        """Check every value; a wrong one is a ValueError that names its flag."""
        _check_choices(self)


def settings_of(config_type: type[LLRConfig | ScriptConfig], *kinds: Kind) -> tuple[str, ...]:
    """Names of the settings of some kinds, in their order."""
    return tuple(each.name for each in fields(config_type) if each.metadata["kind"] in kinds)


def shared_settings(config: LLRConfig | ScriptConfig) -> dict[str, Any]:
    """Flag -> value of all settings that must be the same on every rank."""
    local = settings_of(type(config), "local")
    return {flag(name): value for name, value in asdict(config).items() if name not in local}


def _check_choices(config: LLRConfig | ScriptConfig) -> None:
    for each in fields(config):
        value = getattr(config, each.name)
        if get_origin(each.type) is Literal and value not in get_args(each.type):
            raise _bad(each.name, value, ", ".join(get_args(each.type)))


def _bad(field: str, got: object, allowed: str) -> ValueError:
    return user_error(f"bad {flag(field)}", got=got, allowed=allowed, remedy=f"set {flag(field)}")
