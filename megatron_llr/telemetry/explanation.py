"""Why a matrix has the learning rate that it has: every factor, from its shape to the rate."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_llr.config import LLRConfig, flag
from megatron_llr.errors import user_error
from megatron_llr.matrices.ids import EMBEDDING_IDS, MatrixId
from megatron_llr.matrices.info import MIN_EIGENVALUES, MatrixIndex
from megatron_llr.policies import acts_on, held_at_one, read_role_table
from megatron_llr.policy_table import LEARNING_RATE, row_of
from megatron_llr.schedule import MultiplierSchedule
from megatron_llr.telemetry.tables import shards_of


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """Why one matrix has its learning rate. `str()` is a text of about ten lines.

    Attributes:
        matrix: matrix id.
        update: number of the update that the rates belong to.
        done: whether that update was made; else it is the next one.
        shape: rows and columns of the whole matrix.
        shards: how many shards, on which ranks.
        owner: global rank that computes its spectrum; None if it is not measured.
        exponent: its exponent in the last measurement; None if there is none.
        exponent_rank: 1 for the smallest of all exponents, that of the heaviest tail.
        exponents: number of matrices with an exponent.
        estimator: of the exponents.
        policy: what gives the targets, with its mapping and bounds.
        rule: why the mapping does not decide here; empty if it does.
        target: multiplier that the last ramp leads to.
        measured_at: update that the last measurement preceded; None before the first.
        ramp_done: updates of the ramp up to and including `update`.
        ramp_length: updates until the target is reached.
        multiplier: at `update`.
        on_rate: whether the multiplier is a factor on the learning rate, not on the weight decay.
        base_rate: base learning rate; None if this rank does not step the matrix.
        weight_decay: weight decay of the optimizer with what the multiplier does to it; None if
            this rank does not step the matrix.
        radius: Frobenius norm that its hyperball step keeps; None without one.
    """

    matrix: str
    update: int
    done: bool
    shape: tuple[int, int]
    shards: str
    owner: int | None
    exponent: float | None
    exponent_rank: int | None
    exponents: int
    estimator: str
    policy: str
    rule: str
    target: float
    measured_at: int | None
    ramp_done: int
    ramp_length: int
    multiplier: float
    on_rate: bool
    base_rate: float | None
    weight_decay: float | None
    radius: float | None = None

    @property
    def rate(self) -> float | None:
        """Learning rate of the matrix; None if this rank does not step it."""
        if self.base_rate is None:
            return None
        return self.base_rate * self.multiplier if self.on_rate else self.base_rate

    def __str__(self) -> str:
        rows, columns = self.shape
        owner = "not measured" if self.owner is None else f"measured by rank {self.owner}"
        exponent = "none"
        if self.exponent is not None:
            exponent = (
                f"{self.exponent:.4f} ({self.estimator}), number {self.exponent_rank} of "
                f"{self.exponents} from the smallest"
            )
        if self.measured_at is None:
            ramp = "nothing was measured yet"
        else:
            ramp = (
                f"update {self.ramp_done} of {self.ramp_length} to the target"
                if self.ramp_done < self.ramp_length
                else "finished"
            ) + f"; last measurement before update {self.measured_at}"
        lines: tuple[tuple[str, str], ...] = (
            ("shape", f"{rows}x{columns}"),
            ("shards", f"{self.shards}; {owner}"),
            ("exponent", exponent),
            ("policy", self.policy + (f"; {self.rule}" if self.rule else "")),
            ("target", f"{self.target:.4f}"),
            ("ramp", ramp),
            ("multiplier", f"{self.multiplier:.4f}" + ("" if self.on_rate else " (weight decay)")),
            ("base rate", _number(self.base_rate)),
            ("learning rate", _number(self.rate)),
            ("weight decay", _number(self.weight_decay)),
        )
        if self.radius is not None:
            lines += (("norm", f"{self.radius:.4g}, kept: the rates are relative to it"),)
        when = "used in" if self.done else "for"
        head = f"{self.matrix}, {when} update {self.update}"
        return "\n".join([head, *(f"  {name:<14}{text}" for name, text in lines)])


def _number(value: float | None) -> str:
    return "held by other ranks" if value is None else f"{value:.4g}"


def find_matrix(name: str, matrix_index: MatrixIndex) -> MatrixId:
    """The matrix of the model that a user names.

    Raises:
        ValueError: naming some that are.
    """
    matrix = next((matrix for matrix in matrix_index if matrix == name), None)
    if matrix is None:
        names = list(matrix_index)
        raise user_error(
            f"the model has no matrix {name!r}",
            got=name,
            allowed=f"one of {len(names)} ids, such as {', '.join(names[:4])}",
            remedy=f"see {flag('dry_run')} for all ids",
        )
    return matrix


def _rule(
    matrix: MatrixId, matrix_index: MatrixIndex, config: LLRConfig, radius: float | None
) -> str:
    """What fixes a multiplier without the mapping."""
    policy = row_of(config.policy)
    if not (matrix_index[matrix].tunable or policy.sets_small):
        return f"fewer than {MIN_EIGENVALUES} eigenvalues: 1"
    if matrix in held_at_one(matrix_index, config):
        return f"{flag('router')} one: 1"
    if matrix == "head" and radius is not None and policy.mapped and config.embedding != "measured":
        return f"{flag('hyperball')}: the head has 1"
    if matrix in EMBEDDING_IDS and (policy.mapped or config.policy == "embedding-only"):
        return f"{flag('embedding')} {config.embedding}"
    if config.role_table is not None:
        pattern = read_role_table(config.role_table).pattern_of(matrix)
        return f"row {pattern!r} of {flag('role_table')}" if pattern else "no row matches: 1"
    return ""


def _policy(config: LLRConfig) -> str:
    if not row_of(config.policy).mapped:
        return config.policy
    inverse = ", inverse" if config.inverse else ""
    bounds = f"{config.min_multiplier:g} to {config.max_multiplier:g}"
    return f"{config.policy}, {config.mapping} from {bounds}{inverse}"


def explain_matrix(
    matrix: MatrixId,
    config: LLRConfig,
    matrix_index: MatrixIndex,
    *,
    owner: int | None,
    alphas: Mapping[MatrixId, float],
    schedule: MultiplierSchedule | None,
    shared: bool,
    update: int,
    done: bool,
    base: tuple[float, float] | None,
    radius: float | None = None,
) -> Explanation:
    """Collect what decides on the learning rate of a matrix.

    Args:
        matrix: matrix id.
        config: the settings.
        matrix_index: all matrices of the job.
        owner: global rank that computes its spectrum, if any.
        alphas: exponents of the last measurement.
        schedule: the schedule; None before `prepare`.
        shared: whether the optimizer makes it share the multiplier of its parameter.
        update: the last update, or the next where none was made.
        done: whether it was made.
        base: base learning rate and weight decay, if this rank's optimizers step the matrix.
        radius: norm that its hyperball step keeps, if it has one.
    """
    usable = sorted(alpha for alpha in alphas.values() if math.isfinite(alpha))
    alpha = alphas.get(matrix, math.nan)
    exponent = alpha if math.isfinite(alpha) else None
    rules = [_rule(matrix, matrix_index, config, radius)]
    if owner is not None and exponent is None and alphas:
        rules.append("no usable exponent: multiplier kept")
    if shared:
        rules.append("the optimizer cannot step parts of a tensor: mean over its parameter")
    elif config.granularity != "projection":
        rules.append(f"{flag('granularity')} {config.granularity}: mean of those that share")
    on_rate = acts_on(config.policy) == LEARNING_RATE
    ramp_done, ramp_length = schedule.ramp_at(update) if schedule else (0, 0)
    multiplier = schedule.multipliers(update).get(matrix, 1.0) if schedule else 1.0
    base_rate, decay = base or (None, None)
    if decay is not None and not on_rate:
        decay *= multiplier
    elif decay is not None and multiplier == 0:
        decay = 0.0
    elif decay is not None and config.weight_decay == "decoupled":
        decay /= multiplier
    info = matrix_index[matrix]
    return Explanation(
        matrix=matrix,
        update=update,
        done=done,
        shape=(info.rows, info.columns),
        shards=shards_of(info),
        owner=owner,
        exponent=exponent,
        exponent_rank=None if exponent is None else 1 + usable.index(exponent),
        exponents=len(usable),
        estimator=config.estimator,
        policy=_policy(config),
        rule="; ".join(rule for rule in rules if rule),
        target=schedule.targets.get(matrix, 1.0) if schedule else 1.0,
        measured_at=schedule.measured_at if schedule else None,
        ramp_done=ramp_done,
        ramp_length=ramp_length,
        multiplier=multiplier,
        on_rate=on_rate,
        base_rate=base_rate,
        weight_decay=decay,
        radius=radius,
    )
