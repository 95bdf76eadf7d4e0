"""Carries measurements and learning rates to the files, the host's writers and the console."""

import logging
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

from megatron_llr.observe.csv_log import CsvLog
from megatron_llr.observe.summary import by_role
from megatron_llr.records import Directory, SpectrumTable, block_of, role_of

logger = logging.getLogger(__name__)


class MatrixRates(NamedTuple):
    """What one update did to one matrix.

    Attributes:
        multiplier: factor on the base learning rate.
        learning_rate: the rate that the update used.
        effective_learning_rate: that rate over the Frobenius norm of the weights after it.
        relative_update: norm of what the update changed over the same norm; None if not recorded.
    """

    multiplier: float
    learning_rate: float
    effective_learning_rate: float
    relative_update: float | None = None


class ScalarWriter(Protocol):
    """What is asked of TensorBoard's SummaryWriter."""

    def add_scalar(self, tag: str, value: float, step: int) -> object:
        """Record one value."""


def _series(matrix: str) -> str:
    """Name of a matrix in a scalar's tag: role first, so that a role's curves lie together."""
    block = block_of(matrix)
    return role_of(matrix) if block is None else f"{role_of(matrix)}/block_{block:03d}"


class Observer:
    """What a run leaves behind.

    Args:
        say: prints a line, on one rank of the job.
        csv_log: the CSV files, on the rank that writes them.
        tensorboard: the host's writer, on the rank that has one.
        wandb: the host's Weights & Biases module or run, on the rank that has one.
        log_interval: updates from one row of learning rates to the next.
    """

    def __init__(
        self,
        *,
        say: Callable[[str], None],
        csv_log: CsvLog | None = None,
        tensorboard: ScalarWriter | None = None,
        wandb: Any = None,
        log_interval: int = 100,
    ) -> None:
        self.say = say
        self.log_interval = log_interval
        self._csv = csv_log
        self._tensorboard = tensorboard
        self._wandb = wandb

    def open(self, *, measured_up_to: int, rates_up_to: int) -> None:
        """Begin the files, or cut what a resumed run will write again.

        Raises:
            OSError: if the folder cannot be written.
        """
        if self._csv is not None:
            self._csv.open(measured_up_to=measured_up_to, rates_up_to=rates_up_to)

    def measured(
        self,
        iteration: int,
        table: SpectrumTable,
        targets: Mapping[str, float],
        directory: Directory,
        spectra: Mapping[str, Any],
    ) -> None:
        """Record a measurement that precedes update `iteration`."""
        if self._csv is not None:
            self._guarded(
                lambda csv_log: csv_log.write_measurement(iteration, table, targets, directory)
            )
            self._guarded(lambda csv_log: csv_log.write_spectra(spectra))
        alphas = {matrix: record.alpha_hill_median for matrix, record in table.items()}
        self._scalars("llr/alpha_hill_median", alphas, iteration)
        self._scalars("llr/target_multiplier", targets, iteration)

    def stepped(self, iteration: int, rates: Mapping[str, MatrixRates]) -> None:
        """Record the learning rates that update `iteration` used, and how far it went."""
        if self._csv is not None:
            rows = [(matrix, *values) for matrix, values in rates.items()]
            self._guarded(lambda csv_log: csv_log.write_rates(iteration, rows))
        for name in MatrixRates._fields:
            values = {matrix: getattr(found, name) for matrix, found in rates.items()}
            known = {matrix: value for matrix, value in values.items() if value is not None}
            self._scalars(f"llr/{name}", known, iteration)

    def _guarded(self, write: Callable[[CsvLog], None]) -> None:
        """A log that cannot be written is no reason to lose a training run."""
        assert self._csv is not None
        try:
            write(self._csv)
        except OSError as broken:
            logger.warning("megatron_llr: %s not written: %s", self._csv.folder, broken)

    def _scalars(self, tag: str, values: Mapping[str, float], iteration: int) -> None:
        if self._tensorboard is None and self._wandb is None:
            return
        scalars = {f"{tag}/{_series(matrix)}": value for matrix, value in values.items()}
        for role, spread in by_role(values).items():
            for name, value in (("mean", spread.mean), ("min", spread.low), ("max", spread.high)):
                scalars[f"{tag}-by-role/{role}/{name}"] = value
        try:
            if self._tensorboard is not None:
                for name, value in scalars.items():
                    self._tensorboard.add_scalar(name, value, iteration)
            if self._wandb is not None:
                self._wandb.log(scalars, iteration)
        except Exception as broken:  # a full disk, a lost server: each writer has errors of its own
            logger.warning("megatron_llr: %s not written: %s", tag, broken)
