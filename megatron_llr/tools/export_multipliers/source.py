"""Read the multipliers of one update of a run: from its log folder, or from a checkpoint."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from megatron_llr import state
from megatron_llr.config import LLRConfig, flag
from megatron_llr.errors import input_error
from megatron_llr.matrices.ids import ROUTER, MatrixId
from megatron_llr.policies import acts_on
from megatron_llr.policies.role_table import RoleTable, TableRow
from megatron_llr.policy_table import WEIGHT_DECAY
from megatron_llr.schedule import MultiplierSchedule
from megatron_llr.telemetry.csv_log import files_of
from megatron_llr.telemetry.read_logs import read_rows
from megatron_llr.tools.convert.read_torch_dist import (
    TorchDistReader,
    iteration_folder,
    layerwise_state,
)


@dataclass(frozen=True, kw_only=True)
class ExportedRates:
    """The multipliers of one update.

    Attributes:
        update: number of the update that they belong to, from 1.
        origin: where they were read, in words.
        multipliers: matrix id -> factor on the base learning rate.
        decay_factors: matrix id -> factor on the weight decay besides the multiplier, default 1.
        decoupled: whether weight decay is independent of the multiplier.
        sizes: matrix id -> number of elements, up to a factor that the matrices of one Megatron
            parameter share.
        hyperball: whether the run had hyperball steps.
        base: settings of the run: `lr`, `min_lr`, `weight_decay`; empty if they are not saved.
    """

    update: int
    origin: str
    multipliers: Mapping[MatrixId, float]
    decay_factors: Mapping[MatrixId, float] = field(default_factory=dict)
    decoupled: bool = False
    sizes: Mapping[MatrixId, int] = field(default_factory=dict)
    hyperball: bool = False
    base: Mapping[str, float] = field(default_factory=dict)

    def row(self, matrix: MatrixId) -> TableRow:
        """The row of a matrix in a role table."""
        return TableRow(self.multipliers[matrix], self.decay_factors.get(matrix, 1.0))

    def decay(self, matrix: MatrixId) -> float:
        """What a matrix decays by in an update, over base learning rate x base weight decay."""
        factor = self.decay_factors.get(matrix, 1.0)
        moves = self.multipliers[matrix] if not self.decoupled else 1.0
        return 0.0 if self.multipliers[matrix] == 0 else moves * factor

    def as_decay_factors(self) -> "ExportedRates":
        """The same where the multipliers are factors on the weight decay (AlphaDecay)."""
        ones = dict.fromkeys(self.multipliers, 1.0)
        return replace(self, multipliers=ones, decay_factors=self.multipliers, decoupled=False)


def read_logs(folder: Path, update: int | None, *, decoupled: bool) -> ExportedRates:
    """The multipliers that an update used, from `learning_rates.csv`.

    Args:
        folder: `--llr-log-dir` of the run.
        update: a logged update; by default the last one.
        decoupled: whether the run had `--llr-weight-decay decoupled`; logs do not say so.

    Raises:
        ValueError: if the folder has no row per matrix, or none of the update.
    """
    measurements, path = (file.path for file in files_of(folder, by_role=False))
    if not path.is_file():
        raise input_error(
            f"{folder} has no {path.name}. It must be the log folder of a run with a row per "
            f"matrix. Give the folder of {flag('log_dir')} of a run with {flag('log_matrices')} "
            "all, or one of its checkpoints."
        )
    multipliers: dict[MatrixId, float] = {}
    bases: dict[MatrixId, float] = {}
    first = last = None
    try:
        # One update at a time: the file of a long run does not fit into memory.
        for row in read_rows(path):
            number = int(row["iteration"])
            if update is None and number != last:
                multipliers, bases = {}, {}
            first, last = number if first is None else first, number
            if update in (None, number):
                matrix = MatrixId.read(row["matrix"])
                multipliers[matrix] = float(row["multiplier"])
                bases[matrix] = float(row["learning_rate"])
        sizes = {
            MatrixId.read(row["matrix"]): int(row["rows"]) * int(row["cols"])
            for row in (read_rows(measurements) if measurements.is_file() else ())
        }
    except (KeyError, TypeError, ValueError) as broken:
        raise input_error(
            f"Cannot read {path}: {type(broken).__name__}: {broken}. It must be the file that a "
            "run wrote. Choose another folder."
        ) from broken
    chosen = last if update is None else update
    if chosen is None or not multipliers:
        held = "has no rows" if first is None else f"has updates {first} to {last}"
        raise input_error(
            f"{path} has no row of update {chosen}: it {held}, one every --log-interval. Choose "
            "one of these with --iteration, or leave it out for the last."
        )
    origin = f"update {chosen} in {path}"
    rates = ExportedRates(
        update=chosen, origin=origin, multipliers=multipliers, decoupled=decoupled, sizes=sizes
    )
    return rates.as_decay_factors() if _on_decay(multipliers, bases) else rates


def _on_decay(multipliers: Mapping[MatrixId, float], rates: Mapping[MatrixId, float]) -> bool:
    """Whether multipliers differ but learning rates do not: they were factors on the decay."""
    known = [rate for rate in rates.values() if not math.isnan(rate)]
    return len(set(multipliers.values())) > 1 and len(set(known)) == 1 and known[0] > 0


def read_checkpoint(root: Path, iteration: int | None) -> ExportedRates:
    """The multipliers of the first update after a torch_dist checkpoint.

    Args:
        root: the folder given to Megatron's `--save`, or that of one iteration.
        iteration: of the checkpoint; by default the last one.

    Raises:
        ValueError: if there is none, or it has no state of this package.
    """
    folder = iteration_folder(root, None if iteration is None else str(iteration))
    common = TorchDistReader(folder).common_state()
    document = layerwise_state(common)
    if document is None:
        raise input_error(
            f"{folder} has no state of this package. Choose a checkpoint of a run with --llr-* "
            "flags, or the log folder of the run."
        )
    state.require_valid(document)
    try:
        return _from_document(document, common["args"], folder)
    except (AttributeError, KeyError, TypeError) as broken:
        raise input_error(
            f"The extension's state in {folder} cannot be read: {type(broken).__name__}: {broken}. "
            "Choose another checkpoint with --iteration."
        ) from broken


def _from_document(document: Mapping[str, Any], args: Any, folder: Path) -> ExportedRates:
    update, meaning = int(document["next_update"]), document["meaning"]
    matrices = [MatrixId.read(text) for text in document["matrices"]]
    schedule = MultiplierSchedule.resume(LLRConfig(), document["schedule"])
    now = schedule.multipliers(update)
    multipliers = {matrix: now.get(matrix, 1.0) for matrix in matrices}
    origin = f"update {update}, the first after the checkpoint {folder}"
    rates = ExportedRates(
        update=update,
        origin=origin,
        multipliers=multipliers,
        decay_factors=_table_factors(meaning, matrices),
        decoupled=document["timing"]["weight_decay"] == "decoupled",
        sizes=relative_sizes(args, matrices),
        hyperball=bool(meaning["hyperball"]),
        base={name: float(getattr(args, name)) for name in ("lr", "min_lr", "weight_decay")},
    )
    return rates.as_decay_factors() if acts_on(meaning["policy"]) == WEIGHT_DECAY else rates


def _table_factors(
    meaning: Mapping[str, Any], matrices: Iterable[MatrixId]
) -> dict[MatrixId, float]:
    """Factors on the weight decay that the run's role table gave."""
    rows = dict(meaning["role_table"] or {})
    table = RoleTable("", {pattern: TableRow.read(value) for pattern, value in rows.items()})
    return {
        matrix: table.row(matrix).weight_decay
        for matrix in matrices
        if matrix.role != ROUTER or meaning["router"] != "one"
    }


def relative_sizes(args: Any, matrices: Iterable[MatrixId]) -> dict[MatrixId, int]:
    """Sizes of the matrices that Megatron fuses into one parameter, relative to each other.

    Args:
        args: Megatron's, from a checkpoint.
        matrices: matrix ids.
    """
    heads = int(args.num_attention_heads)
    groups = int(args.num_query_groups or heads) if args.group_query_attention else heads
    by_role = {"q": heads, "attention.gate": heads, "k": groups, "v": groups}
    return {matrix: by_role.get(matrix.role, 1) for matrix in matrices}
