"""The controller of a run: measure when due, apply the policy, move the multipliers, save state."""

import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from megatron_llr import state
from megatron_llr.config import LLRConfig, flag, settings_of
from megatron_llr.matrices.ids import MatrixId
from megatron_llr.matrices.info import MatrixIndex
from megatron_llr.matrices.shard import MatrixShard
from megatron_llr.measurement.measure import SpectrumEngine
from megatron_llr.measurement.shape_exponents import shape_exponents
from megatron_llr.param_groups.hyperball_norms import plain_matrices, shared_norms, start_lines
from megatron_llr.param_groups.layer_groups import LayerGroups
from megatron_llr.param_groups.step_recorder import MatrixSums, StepRecorder
from megatron_llr.policies import (
    acts_on,
    decay_factors,
    held_at_one,
    meaning_of,
    report_table,
    share_multipliers,
    share_saved,
    targets_for,
)
from megatron_llr.policy_table import LEARNING_RATE, POLICIES, row_of
from megatron_llr.ranks import exchange, gather_objects, require_equal, together
from megatron_llr.schedule import MultiplierSchedule
from megatron_llr.telemetry.explanation import Explanation, explain_matrix, find_matrix
from megatron_llr.telemetry.observer import Observer
from megatron_llr.telemetry.rates import matrix_rates
from megatron_llr.telemetry.tables import block_table, by_role, matrix_table, role_table

# Above this many matrices, suggest `--llr-log-matrices roles`.
_MANY = 2000


class LayerwiseController:
    """One run's layerwise learning rates. Made by `make_controller`.

    Call `prepare()` once, after the weights are loaded and before the first update; then
    `after_update()` after every successful update. Both are entered by all ranks.

    Attributes:
        config: the settings.
        matrix_index: every logical matrix of the job.
        next_update: number of the next successful update, from 1.
    """

    def __init__(
        self,
        config: LLRConfig,
        matrix_index: MatrixIndex,
        catalog: Sequence[MatrixShard],
        engine: SpectrumEngine,
        layer_groups: LayerGroups,
        observer: Observer,
        *,
        inseparable: Collection[str],
        synchronize: Callable[[], None],
        total_updates: int,
        iteration: int,
    ) -> None:
        self.config = config
        self.matrix_index = matrix_index
        self.next_update = iteration + 1
        self._catalog = catalog
        self._engine = engine
        self._layer_groups = layer_groups
        self._observer = observer
        self._inseparable = inseparable
        self._synchronize = synchronize
        self._meaning = meaning_of(config)
        self._policy = row_of(config.policy)
        self._on_rate = acts_on(config.policy) == LEARNING_RATE
        self._device = catalog[0].parameter.device if catalog else torch.device("cpu")
        self._total_updates = total_updates
        self._schedule: MultiplierSchedule | None = None
        self._document: dict[str, Any] | None = None
        self._alphas: dict[MatrixId, float] = {}
        self._recorder: StepRecorder | None = None
        self._radii: dict[MatrixId, float] = {}
        self._plain: dict[MatrixId, str] = {}
        self._stepped = False

    def prepare(self, iteration: int | None = None) -> None:
        """Start, or continue from a loaded state. Enter on all ranks, once.

        Args:
            iteration: updates done before this run, if it was not known to `make_controller`.

        Raises:
            ValueError: if the window for measurements has passed.
            RuntimeError: if the log folder is unusable, or ranks are at different updates or have
                different states.
        """
        assert self._schedule is None, "prepare() was called twice"
        if iteration is not None:
            self.next_update = iteration + 1
        if self._document is not None:
            self.next_update = int(self._document["next_update"])
        self._ask_who_reads()
        s, resumed = self.next_update, self._document is not None
        require_equal(
            {
                "the number of the next update": s,
                "the extension's state in the checkpoint": state.digest(self._document),
            },
            lambda _: f"load one checkpoint on every rank; {flag('reset_state')} ignores its state",
        )
        if self.config.hyperball:
            self._start_hyperball()
        for line in report_table(self.config, self.matrix_index):
            self._observer.say(line)
        self._layer_groups.set_decay_factors(
            decay_factors(self.config, self.matrix_index, self._inseparable)
        )
        # Before the log is truncated: a run that this refuses leaves it unchanged.
        if self._document is None:
            self._schedule = MultiplierSchedule(self.config, self._total_updates, start=s)
        else:
            # The saved window is kept; a longer --train-iters does not move it.
            schedule = share_saved(self._document["schedule"], self.matrix_index, self._inseparable)
            self._schedule = MultiplierSchedule.resume(self.config, schedule)
            saved = self._document["alphas"]
            self._alphas = {
                MatrixId.read(m): math.nan if a is None else a for m, a in saved.items()
            }
        together(
            lambda: self._observer.open(
                measured_up_to=s if resumed else s - 1, rates_up_to=s - 1, resumed=resumed
            )
        )
        if not resumed:
            self._measure()
        self._set_multipliers()

    def after_update(self) -> None:
        """Count a successful update; measure if one is due. Enter on all ranks."""
        assert self._schedule is not None, "prepare() must come before after_update()"
        done, self.next_update = self.next_update, self.next_update + 1
        self._stepped = True
        if self._logged(done):
            self._observe_rates(done)
        if self._schedule.due(self.next_update):
            self._measure()
        self._set_multipliers(moved=not self._schedule.settled(self.next_update))

    def _measure(self) -> None:
        """Measure before the next update: spectra, exponents, policy, targets of the schedule."""
        assert self._schedule is not None
        self._synchronize()
        measurement = self._engine.measure()
        alphas = {}
        for matrix, info in self.matrix_index.items():
            if info.tunable or self._policy.sets_small:
                record = measurement.table.get(matrix)
                alpha = record.alpha(self.config.estimator) if record else None
                alphas[matrix] = math.nan if alpha is None else alpha
        asked = shape_exponents(alphas, self.matrix_index) if self._policy.of_shape else alphas
        targets = self._policy_targets(asked)
        shared = self._shared(targets)
        self._schedule.observe(self.next_update, shared)
        self._alphas = {m: alpha for m, alpha in alphas.items() if m in measurement.table}
        # A policy may leave other matrices out on purpose.
        kept = [m for m, alpha in alphas.items() if m not in targets and not math.isfinite(alpha)]
        self._observer.say_measured(
            self.next_update, len(measurement.table), measurement.seconds, kept
        )
        self._observer.measured(
            self.next_update, measurement.table, shared, self.matrix_index, measurement.spectra
        )

    def _set_multipliers(self, *, moved: bool = True) -> None:
        """Give the layer groups the multipliers of the next update."""
        assert self._schedule is not None
        if moved:
            here = self._layer_groups.matrices
            now = self._schedule.multipliers(self.next_update, here)
            self._layer_groups.set_multipliers(now)
        if self._recorder is not None:
            self._recorder.arm(record=self._logged(self.next_update))

    @property
    def multipliers(self) -> dict[MatrixId, float]:
        """Matrix id -> multiplier of the next update; 1 before `prepare`.

        A factor on the learning rate or, with a policy that sets it, on the weight decay.
        """
        now = self._schedule.multipliers(self.next_update) if self._schedule else {}
        return {matrix: now.get(matrix, 1.0) for matrix in self.matrix_index}

    @property
    def alphas(self) -> dict[MatrixId, float]:
        """Matrix id -> exponent (of `config.estimator`) from the last measurement."""
        return dict(self._alphas)

    def role_summary(self) -> str:
        """A table per role: mean exponent, range of multipliers."""
        counts = Counter(matrix.role for matrix in self.matrix_index)
        alphas, factors = by_role(self._alphas), by_role(self.multipliers)
        return role_table(counts, alphas, factors, self.config.estimator)

    def describe(self) -> str:
        """A table of every matrix, or block and role: shape, shards, owner, multiplier."""
        table = block_table if self.config.log_matrices == "roles" else matrix_table
        steps = {m: self._plain.get(m, "hyperball") for m in self.matrix_index if self._radii}
        return table(self.matrix_index, self._engine.owners, self.multipliers, steps)

    def explain(self, matrix: str) -> str:
        """Why a matrix has its learning rate: shape, shards, exponent, policy, target, ramp, rates.

        Raises:
            ValueError: if the model has no such matrix.
        """
        return str(self.explanation(matrix))

    def explanation(self, name: str) -> Explanation:
        """The values that `explain` prints. Needs no other rank.

        Only the ranks that step the matrix know the base learning rate and the weight decay.
        """
        matrix = find_matrix(name, self.matrix_index)
        return explain_matrix(
            matrix,
            self.config,
            self.matrix_index,
            owner=self._engine.owners.get(matrix),
            alphas=self._alphas,
            schedule=self._schedule,
            shared=matrix in self._inseparable,
            update=self.next_update - self._stepped,
            done=self._stepped,
            base=self._layer_groups.base_settings(matrix),
            radius=self._layer_groups.radii.get(matrix),
        )

    def state_dict(self) -> dict[str, Any]:
        """The state document: plain JSON values, identical on every rank.

        Before `prepare` it is the loaded document or empty, so that a checkpoint saved before
        training loses nothing.
        """
        if self._schedule is None:
            return dict(self._document or {})
        # The window of a loaded state is kept, even if this run's flags differ.
        timing = self._document["timing"] if self._document is not None else {}
        window = {name: timing[name] for name in settings_of(LLRConfig, "window") if name in timing}
        return {
            "version": state.VERSION,
            "next_update": self.next_update,
            "matrices": [str(matrix) for matrix in self.matrix_index],
            "meaning": dict(self._meaning),
            "timing": {**self.config.timing(), **window},
            "schedule": self._schedule.state_dict(),
            # JSON has no NaN.
            "alphas": {str(m): None if math.isnan(a) else a for m, a in self._alphas.items()},
            "radii": {str(matrix): norm for matrix, norm in self._radii.items()},
        }

    def load_state_dict(self, document: Mapping[str, Any]) -> None:
        """Take a saved state document; `prepare` continues from it.

        Raises:
            ValueError: if this run cannot continue from it (`--llr-reset-state` ignores it).
        """
        if self.config.reset_state or not document:
            return
        for line in state.check(document, self.config, self.matrix_index, self._meaning):
            self._observer.say(line)
        self._document = dict(document)

    def _start_hyperball(self) -> None:
        """Keep the norms of matrices from now on: the saved ones, or those of the weights now."""
        saved = (self._document or {}).get("radii", {})
        self._radii = shared_norms(self._layer_groups.norms(self._catalog), saved)
        self._plain = plain_matrices(self._radii, self.matrix_index)
        stepped = {m: norm for m, norm in self._radii.items() if m not in self._plain}
        self._layer_groups.start_hyperball(stepped, self.config.hyperball_lr)
        self._inseparable = [m for m in self._inseparable if m not in stepped]
        unsaved = None if saved else self.next_update
        for line in start_lines(len(stepped), self._plain, self.config.hyperball_lr, unsaved):
            self._observer.say(line)

    def _ask_who_reads(self) -> None:
        """Gather what every rank writes: values that no rank reads are not computed or sent."""
        observer = self._observer
        readers = gather_objects((observer.writes, observer.reads_spectra))
        rates_read = any(writes for writes, _ in readers)
        if rates_read:
            self._recorder = StepRecorder(
                self._layer_groups.parts_in(self._catalog),
                list(self.matrix_index),
                self._device,
                updates=self.config.log_relative_update,
            )
        self._engine.readers = [rank for rank, (_, reads) in enumerate(readers) if reads]
        every_matrix = rates_read and self.config.log_matrices == "all"
        if every_matrix and len(self.matrix_index) > _MANY:
            observer.say(
                f"{len(self.matrix_index)} matrices, each with rows and curves of its own; "
                f"{flag('log_matrices')} roles logs blocks and roles instead"
            )

    def _policy_targets(self, alphas: Mapping[MatrixId, float]) -> dict[MatrixId, float]:
        """Multipliers that the policy maps exponents to (NaN: none), the same on every rank."""
        targets = together(lambda: targets_for(alphas, self.config))
        if self.config.policy not in POLICIES:
            # The user's own function runs on every rank and may give random or local values.
            require_equal(
                {f"target of {matrix}": targets.get(matrix) for matrix in alphas},
                lambda _: f"make {self.config.policy} give the same on every rank",
            )
        return targets

    def _shared(self, targets: Mapping[MatrixId, float]) -> dict[MatrixId, float]:
        """Targets of all matrices, averaged where they share one (granularity or optimizer)."""
        assert self._schedule is not None
        # A matrix that is too small to be measured counts as 1, not as the mean it last shared.
        before = {m: v for m, v in self._schedule.targets.items() if self.matrix_index[m].tunable}
        return share_multipliers(
            {**before, **targets},
            self.matrix_index,
            self.config.granularity,
            self._inseparable,
            held_at_one(self.matrix_index, self.config),
        )

    def _logged(self, update: int) -> bool:
        return self._recorder is not None and update % self._observer.log_interval == 0

    def _observe_rates(self, done: int) -> None:
        """Log the learning rates of update `done` and the norms after it: one all-reduce."""
        assert self._schedule is not None
        assert self._recorder is not None
        sums = self._recorder.local_sums()
        with exchange("the log of learning rates"):
            dist.all_reduce(sums.table)
        if not self._observer.writes:
            return
        used = self._schedule.multipliers(done)
        numel = [info.numel for info in self.matrix_index.values()]
        ratios, radii = MatrixSums(sums.table.cpu()).ratios(numel), self._layer_groups.radii
        rates = matrix_rates(self.matrix_index, ratios, used, radii, on_rate=self._on_rate)
        self._observer.stepped(done, rates)
