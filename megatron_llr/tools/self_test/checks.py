"""The four checks of one layout, on Megatron's own training loop."""

import math
import shutil
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing

from megatron_llr.errors import first_line
from megatron_llr.megatron.repeated_runs import OnUpdate, TrainingRun, run_once
from megatron_llr.tools.self_test.layouts import LLR, SAVED_AT, UPDATES, Layout
from megatron_llr.tools.self_test.progress import Progress
from megatron_llr.tools.self_test.rates import RateCheck
from megatron_llr.tools.self_test.results import Cell, Row, combined

# The first multipliers, inside the ramp, after it.
_RATES_AT = (1, 4, 6)
_TOLERANCE = 1e-5
_UNIFORM = ("--llr-policy", "uniform")


@dataclass
class Reference:
    """What the first layout of a model measured, and where its weights are.

    Attributes:
        folder: checkpoint of the weights, before any update.
        values: id of a matrix -> (exponent or None, multiplier).
    """

    folder: Path
    values: dict[str, tuple[float | None, float]] = field(default_factory=dict)


@dataclass
class Checks:
    """Runs the checks of one layout. All ranks call the same methods.

    Attributes:
        layout: one that fits and is available.
        words: command line of its runs, without checkpoints and `--llr-*` flags.
        folder: for its checkpoints, shared by all ranks.
        reference: of its model, filled by the first layout of the model.
        progress: of this rank.
        row: where results go.
    """

    layout: Layout
    words: Sequence[str]
    folder: Path
    reference: Reference
    progress: Progress
    row: Row

    def run(self) -> None:
        """All four. A check that cannot run because plain Megatron or LLR fails says so."""
        self._compare()
        if self.progress.rank == 0:
            shutil.rmtree(self.folder, ignore_errors=True)

    def save_reference(self) -> None:
        """Only save and measure the weights that other layouts load."""
        self._set("multipliers", partial(self._multipliers, RateCheck(())))
        self.row.set_all("not run", "not selected, only saves the weights of its model")
        if self.progress.rank == 0:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _compare(self) -> None:
        self._set("uniform", self._uniform)
        if self.row.cells["uniform"].status == "FAILED" and self._plain is None:
            self.row.set_all("FAILED", "plain Megatron does not train on this layout")
            return
        rates = RateCheck(_RATES_AT)
        self._set("multipliers", partial(self._multipliers, rates))
        if self._unbroken is None:
            self.row.set_all("FAILED", "the run with LLR failed")
            return
        self._set("rates", partial(self._rates, rates))
        self._set("resume", self._resume)

    def __post_init__(self) -> None:
        self._plain: TrainingRun | None = None
        self._unbroken: TrainingRun | None = None

    def _set(self, name: str, check: Callable[[], Cell]) -> None:
        """Run a check on this rank; combine the results of all ranks."""
        error = ""
        try:
            cell = check()
        # Megatron ends the process for a wrong flag.
        except (Exception, SystemExit) as failed:
            traceback.print_exc(file=sys.stderr)
            error = f"{type(failed).__name__}: {first_line(failed)}"
            cell = Cell("FAILED", error)
        cells = self.progress.collect(f"{self.layout.name}: {name}", asdict(cell), error)
        self.row.cells[name] = combined(cells)

    def _train(
        self,
        name: str,
        *flags: str,
        llr: bool = True,
        observe: OnUpdate[TrainingRun] | None = None,
        on_built: Callable[[TrainingRun], None] | None = None,
    ) -> TrainingRun:
        step = f"{self.layout.name}: {name}"

        def on_update(run: TrainingRun, update: int, done: bool) -> None:
            if not done:
                self.progress.mark(f"{step}, update {update}")
            if observe is not None:
                observe(run, update, done)

        self.progress.mark(f"{step}, setup")
        run = TrainingRun()
        words = [*self.words, *(LLR if llr else []), *flags]
        run_once(run, words, llr=llr, on_update=on_update, on_built=on_built)
        return run

    def _everywhere(self, name: str, difference: str) -> str:
        """The first difference of any rank, with its rank; empty if there is none."""
        answers = self.progress.collect(f"{self.layout.name}: {name}", difference)
        return next((f"{text} (rank {rank})" for rank, text in enumerate(answers) if text), "")

    def _uniform(self) -> Cell:
        plain = self._train("plain Megatron", llr=False)
        self._plain = plain
        uniform = self._train("uniform", *_UNIFORM)
        differs = self._everywhere("plain and uniform", difference(plain, uniform))
        if not differs:
            return Cell("ok", f"losses and weights of {UPDATES} updates")
        again = self._train("plain Megatron, second run", llr=False)
        unsteady = self._everywhere("plain and plain", difference(plain, again))
        if unsteady:
            return Cell("not applicable", f"two runs of plain Megatron differ: {unsteady}")
        return Cell("FAILED", f"plain Megatron and uniform differ: {differs}")

    def _multipliers(self, rates: RateCheck) -> Cell:
        first = not self.reference.values
        if first:
            # An earlier layout may have failed and left a part of its own.
            self.reference.folder = self.reference.folder.with_name(f"weights-{self.layout.name}")
        measured: dict[str, tuple[float | None, float]] = {}

        def on_built(run: TrainingRun) -> None:
            (_save if first else _load)(run, self.reference.folder)

        def observe(run: TrainingRun, update: int, done: bool) -> None:
            if update == 1 and not done:
                measured.update(_measured(run))
            rates(run, update, done)

        saved = ("--save", str(self.folder), "--save-interval", str(SAVED_AT))
        self._unbroken = self._train("LLR", *saved, observe=observe, on_built=on_built)
        if first:
            self.reference.values = measured
            return Cell("ok", f"reference of the model: {len(measured)} matrices")
        return _same_values(self.reference.values, measured)

    def _rates(self, rates: RateCheck) -> Cell:
        if rates.failures:
            more = f"; {len(rates.failures) - 1} more" if len(rates.failures) > 1 else ""
            return Cell("FAILED", f"{rates.failures[0]}{more}")
        share = rates.compared / max(rates.elements, 1)
        return Cell(
            "ok", f"{share:.0%} of the elements moved enough to compare, worst {rates.worst:.1e}"
        )

    def _resume(self) -> Cell:
        assert self._unbroken is not None
        load = ("--load", str(self.folder), "--ckpt-step", str(SAVED_AT))
        resumed = self._train("LLR, resumed", *load)
        differs = self._everywhere("resumed", _continues(self._unbroken, resumed, llr=True))
        if not differs:
            return Cell("ok", f"losses, weights and state of updates {SAVED_AT + 1} to {UPDATES}")
        folder = self.folder / "plain"
        save = ("--save", str(folder), "--save-interval", str(SAVED_AT))
        plain = self._train("plain Megatron, saved", *save, llr=False)
        load = ("--load", str(folder), "--ckpt-step", str(SAVED_AT))
        again = self._train("plain Megatron, resumed", *load, llr=False)
        unsteady = self._everywhere("plain resumed", _continues(plain, again, llr=False))
        if unsteady:
            return Cell("not applicable", f"plain Megatron's own resume is not bitwise: {unsteady}")
        return Cell("FAILED", f"the resumed run differs: {differs}")


def difference(one: TrainingRun, other: TrainingRun) -> str:
    """The first difference of two runs on this rank; empty if they are bitwise equal."""
    if len(one.losses) != len(other.losses):
        return f"{len(one.losses)} and {len(other.losses)} losses"
    for update, (a, b) in enumerate(zip(one.losses, other.losses, strict=True), 1):
        if a != b or not math.isfinite(a):
            return f"loss of update {update}: {a!r} and {b!r}"
    return _weights_differ(one, other)


def _weights_differ(one: TrainingRun, other: TrainingRun) -> str:
    weights = other.parameters()
    for name, weight in one.parameters().items():
        if not torch.equal(weight, weights[name]):
            return f"weight {name}"
    return ""


def _continues(unbroken: TrainingRun, resumed: TrainingRun, *, llr: bool) -> str:
    """The first difference of a resumed run from the uninterrupted one; empty if there is none."""
    rest = unbroken.losses[SAVED_AT:]
    if resumed.losses != rest:
        return f"losses {resumed.losses} instead of {rest}"
    if llr and resumed.controller.state_dict() != unbroken.controller.state_dict():
        return "the state document"
    return _weights_differ(unbroken, resumed)


def _measured(run: TrainingRun) -> dict[str, tuple[float | None, float]]:
    alphas = {str(matrix): alpha for matrix, alpha in run.controller.alphas.items()}
    return {
        str(matrix): (alphas.get(str(matrix)), multiplier)
        for matrix, multiplier in run.controller.multipliers.items()
    }


def _same_values(
    expected: Mapping[str, tuple[float | None, float]],
    measured: Mapping[str, tuple[float | None, float]],
) -> Cell:
    if expected.keys() != measured.keys():
        names = sorted(expected.keys() ^ measured.keys())
        return Cell("FAILED", f"other matrices than on the first layout: {names[0]}")
    worst = 0.0
    for matrix, values in expected.items():
        for name, a, b in zip(("exponent", "multiplier"), values, measured[matrix], strict=True):
            if a == b:
                continue
            # A matrix without an exponent has None.
            off = math.inf if a is None or b is None else abs(a - b) / abs(a)
            if not off <= _TOLERANCE:
                return Cell("FAILED", f"{name} of {matrix}: {b}, on the first layout {a}")
            worst = max(worst, off)
    return Cell("ok", f"{len(expected)} matrices, largest relative difference {worst:.1e}")


def _state(run: TrainingRun) -> dict[str, Any]:
    """The weights of a run; not Transformer Engine's scales of FP8 layers, which others lack."""
    return {
        chunk: {key: value for key, value in state.items() if "_extra_state" not in key}
        for chunk, state in run.sharded_state().items()
    }


def _save(run: TrainingRun, folder: Path) -> None:
    """Round the initial weights to bf16, so that every precision has the same; save them."""
    with torch.no_grad():
        for chunk in run.model:
            for parameter in chunk.parameters():
                parameter.copy_(parameter.bfloat16())
    run.optimizer.reload_model_params()
    if torch.distributed.get_rank() == 0:
        folder.mkdir(parents=True)
    torch.distributed.barrier()
    dist_checkpointing.save(_state(run), str(folder))


def _load(run: TrainingRun, folder: Path) -> None:
    run.load_weights(dist_checkpointing.load(_state(run), str(folder)))
