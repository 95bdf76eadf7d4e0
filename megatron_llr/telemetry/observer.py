"""Writes measurements and learning rates to CSV files, TensorBoard, W&B and the console."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from megatron_llr.config import ESTIMATORS
from megatron_llr.matrices.ids import MatrixId
from megatron_llr.matrices.info import MatrixIndex
from megatron_llr.spectrum.record import SpectrumTable
from megatron_llr.telemetry.csv_log import CsvLog
from megatron_llr.telemetry.tables import Spread, by_block_and_role, by_role, spread_of

logger = logging.getLogger(__name__)

# What W&B draws our curves over. Its own step is Megatron's iteration, which skipped updates leave
# behind; and one iteration may hold the rates of an update and the measurement before the next.
_UPDATE, _MEASURED = "llr/update", "llr/measured_before_update"


class MatrixRates(NamedTuple):
    """What one update did to one matrix.

    Attributes:
        multiplier: factor on the base learning rate.
        learning_rate: the rate that the update used.
        effective_learning_rate: that rate over the Frobenius norm of the weights after it.
        relative_update: norm of what the update changed over the same norm; None if not recorded.
        update_cosine: cosine between weights and update direction; None without a hyperball step.
    """

    multiplier: float
    learning_rate: float
    effective_learning_rate: float
    relative_update: float | None = None
    update_cosine: float | None = None


class ScalarWriter(Protocol):
    """What is asked of TensorBoard's SummaryWriter."""

    def add_scalar(self, tag: str, value: float, step: int) -> object:
        """Record one value."""


def _series(matrix: MatrixId) -> str:
    """Name of a matrix in a scalar's tag: role first, so that a role's curves lie together."""
    words = [_group_series(matrix)]
    kind = matrix.module.partition(".")[0]
    if kind[-1:].isdigit():
        # A block's second layer of a kind: mlp2.
        words.append(kind)
    if matrix.expert is not None:
        words.append(f"expert_{matrix.expert:03d}")
    return "/".join(words)


def _group_series(matrix: MatrixId) -> str:
    """Name of a matrix's block and role in a scalar's tag: `up/block_003`, `q/mtp_000`."""
    kind, _, number = matrix.container.partition(".")
    return f"{matrix.role}/{kind}_{int(number):03d}" if number else matrix.role


class Observer:
    """What a run leaves behind.

    Args:
        say: prints a line, on one rank of the job.
        csv_log: the CSV files, on the rank that writes them.
        tensorboard: Megatron's writer, on the rank that has one.
        wandb: Megatron's Weights & Biases module or run, on the rank that has one.
        wandb_step: step of the row that Megatron logs there next. Without it values join the row
            of Megatron's next call of `log`.
        log_interval: updates from one row of learning rates to the next.
        by_role: scalars per block and role, as the CSV files have it where they do.
    """

    def __init__(
        self,
        *,
        say: Callable[[str], None],
        csv_log: CsvLog | None = None,
        tensorboard: ScalarWriter | None = None,
        wandb: Any = None,
        wandb_step: Callable[[], int] | None = None,
        log_interval: int = 100,
        by_role: bool = False,
    ) -> None:
        self.say = say
        self.by_role = by_role
        self.log_interval = log_interval
        self._csv = csv_log
        self._tensorboard = tensorboard
        self._wandb = wandb
        self._wandb_step = wandb_step
        self._last_measured: float | None = None

    @property
    def writes(self) -> bool:
        """Whether this rank writes anything but lines."""
        return any(to is not None for to in (self._csv, self._tensorboard, self._wandb))

    @property
    def reads_spectra(self) -> bool:
        """Whether this rank wants the singular values of every measurement."""
        return self._csv is not None and not self._csv.by_role

    def open(self, *, measured_up_to: int, rates_up_to: int, resumed: bool = False) -> None:
        """Begin the files, or cut what a resumed run will write again.

        Args:
            measured_up_to: last update whose measurement is kept.
            rates_up_to: last update whose learning rates are kept.
            resumed: whether earlier rows are expected.

        Raises:
            OSError: if the folder cannot be written.
        """
        if self._csv is not None:
            new = self._csv.open(measured_up_to=measured_up_to, rates_up_to=rates_up_to)
            if new and resumed:
                self.say(
                    f"{self._csv.folder} has no CSV files of this run: they begin at update "
                    f"{rates_up_to + 1}, and earlier rows are lost"
                )
        if self._wandb is not None:
            self._to_writer("the axes of W&B's curves", self._define_axes)

    def _define_axes(self) -> None:
        axes = {f"llr/{name}*": _UPDATE for name in MatrixRates._fields}
        axes |= dict.fromkeys(("llr/alpha*", "llr/target_multiplier*"), _MEASURED)
        for axis in (_UPDATE, _MEASURED):
            self._wandb.define_metric(axis)
        for curves, axis in axes.items():
            self._wandb.define_metric(curves, step_metric=axis)

    def say_measured(self, update: int, count: int, seconds: float, kept: Sequence[str]) -> None:
        """Print what a measurement cost, and which matrices kept their multiplier."""
        now, share = time.perf_counter(), ""
        if self._last_measured is not None:
            percent = 100 * seconds / (now - self._last_measured)
            share = f" ({percent:.1f} % of the time since the last measurement)"
        self._last_measured = now
        self.say(f"measured {count} matrices before update {update} in {seconds:.2f} s{share}")
        if kept:
            more = f" and {len(kept) - 8} more" if len(kept) > 8 else ""
            self.say(f"no usable exponent, multiplier kept: {', '.join(kept[:8])}{more}")

    def measured(
        self,
        iteration: int,
        table: SpectrumTable,
        targets: Mapping[MatrixId, float],
        matrix_index: MatrixIndex,
        spectra: Mapping[MatrixId, Any],
    ) -> None:
        """Record a measurement that precedes update `iteration`."""
        if self._csv is not None:
            self._guarded(
                lambda csv_log: csv_log.write_measurement(iteration, table, targets, matrix_index)
            )
        if self.reads_spectra:
            self._guarded(lambda csv_log: csv_log.write_spectra(spectra))
        for estimator in ESTIMATORS:
            alphas = {matrix: record.alpha(estimator) for matrix, record in table.items()}
            self._scalars(f"llr/alpha_{estimator}", alphas, iteration, _MEASURED)
        self._scalars("llr/target_multiplier", targets, iteration, _MEASURED)

    def stepped(self, iteration: int, rates: Mapping[MatrixId, MatrixRates]) -> None:
        """Record the learning rates that update `iteration` used, and how far it went."""
        if self._csv is not None:
            rows = [(matrix, *values) for matrix, values in rates.items()]
            self._guarded(lambda csv_log: csv_log.write_rates(iteration, rows))
        for name in MatrixRates._fields:
            values = {matrix: getattr(rate, name) for matrix, rate in rates.items()}
            self._scalars(f"llr/{name}", values, iteration, _UPDATE)

    def _guarded(self, write: Callable[[CsvLog], None]) -> None:
        """A log that cannot be written is no reason to lose a training run."""
        assert self._csv is not None
        try:
            write(self._csv)
        except OSError as broken:
            logger.warning("megatron_llr: %s not written: %s", self._csv.folder, broken)

    def _to_writer(self, what: str, write: Callable[[], None]) -> None:
        try:
            write()
        except Exception as broken:  # a full disk, a lost server: each writer has errors of its own
            logger.warning("megatron_llr: %s not written: %s", what, broken)

    def _scalars(
        self, tag: str, given: Mapping[MatrixId, float | None], iteration: int, axis: str
    ) -> None:
        values = {matrix: value for matrix, value in given.items() if value is not None}
        if not values or (self._tensorboard is None and self._wandb is None):
            return
        scalars = (
            self._by_block(tag, values)
            if self.by_role
            else {f"{tag}/{_series(matrix)}": value for matrix, value in values.items()}
        )
        for role, spread in by_role(values).items():
            scalars.update(_named(f"{tag}-by-role/{role}", spread))

        def write() -> None:
            if self._tensorboard is not None:
                _add_scalars(self._tensorboard, scalars, iteration)
            if self._wandb is not None:
                # A step ahead of Megatron's, or a row closed here, and W&B drops what Megatron logs
                # next; a step behind it, and W&B drops ours.
                step = self._wandb_step() if self._wandb_step else None
                self._wandb.log({**scalars, axis: iteration}, step=step, commit=False)

        self._to_writer(tag, write)

    @staticmethod
    def _by_block(tag: str, values: Mapping[MatrixId, float]) -> dict[str, float]:
        """One scalar where a block has one matrix of a role, else mean, minimum and maximum."""
        scalars: dict[str, float] = {}
        for matrices in by_block_and_role(values).values():
            series = f"{tag}/{_group_series(matrices[0])}"
            spread = spread_of(values[matrix] for matrix in matrices)
            if len(matrices) == 1:
                scalars[series] = values[matrices[0]]
            elif spread is not None:
                scalars.update(_named(series, spread))
        return scalars


def _add_scalars(to: ScalarWriter, scalars: Mapping[str, float], step: int) -> None:
    """As `add_scalar` of each; in one event where the writer is torch's SummaryWriter.

    An event per scalar takes 0.1 ms: with hundreds of matrices that is most of a logged step.
    """
    file_writer: Any = getattr(to, "file_writer", None)
    # tensorboardX has the attribute too, and protocol buffers of its own.
    if type(file_writer).__module__ != "torch.utils.tensorboard.writer":
        for name, value in scalars.items():
            to.add_scalar(name, value, step)
        return
    from tensorboard.compat.proto.summary_pb2 import Summary

    values = [Summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
    file_writer.add_summary(Summary(value=values), step)


def _named(tag: str, spread: Spread) -> dict[str, float]:
    return {f"{tag}/mean": spread.mean, f"{tag}/min": spread.low, f"{tag}/max": spread.high}
