"""Results of a run: its validation losses, and the record that it is done."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_llr.errors import first_line, input_error
from megatron_llr.output import replaced_file
from megatron_llr.tools.compare.grid import Run

DONE = "done.json"
_RECORD_VERSION = 1
_MAX_RECORD_BYTES = 2**20
TRAINING = "lm loss"
VALIDATION = "lm loss validation"


@dataclass(frozen=True)
class Result:
    """A run that is done.

    Attributes:
        run: the run.
        first_loss: training loss at update 1, before any weight has moved; NaN if not logged.
        curve: (iteration, validation loss) at every evaluation.
        diverged: whether its last loss is not finite, or above the first one.
        seconds: wall time of the job.
        environment: package versions.
    """

    run: Run
    first_loss: float
    curve: tuple[tuple[int, float], ...]
    diverged: bool
    seconds: float
    environment: Mapping[str, str]

    @property
    def final(self) -> float:
        """Validation loss of the last evaluation; infinite if the run diverged."""
        return math.inf if self.diverged or not self.curve else self.curve[-1][1]

    @property
    def best(self) -> float:
        """Smallest validation loss; infinite if the run diverged."""
        return math.inf if self.diverged or not self.curve else min(v for _, v in self.curve)


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    """Tag -> iteration -> value in a folder of TensorBoard events; empty without a folder.

    Each start of a job writes one file. Within a file the first value of an iteration counts,
    because Megatron writes the test loss after the validation loss, under the same tag. The file of
    a resumed job replaces the iterations that it repeats.
    """
    values: dict[str, dict[int, float]] = {}
    for path in sorted(folder.glob("events.*")):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(path), size_guidance={"scalars": 0})
        try:
            events.Reload()
        except Exception as broken:  # of TensorBoard and protobuf, which have types of their own
            raise input_error(
                f"Cannot read {path}: {type(broken).__name__}: {first_line(broken)[:200]}. It must "
                "be a file of TensorBoard events. Remove it, or run the job again."
            ) from broken
        for tag in {TRAINING, VALIDATION}.intersection(events.Tags()["scalars"]):
            new = {point.step: point.value for point in reversed(events.Scalars(tag))}
            before = values.get(tag, {}).items()
            values[tag] = {step: value for step, value in before if step < min(new)} | new
    return values


def losses(folder: Path) -> tuple[float, tuple[tuple[int, float], ...]]:
    """First training loss, and validation losses by iteration, of a run's folder."""
    values = scalars(folder / "tensorboard")
    first = values.get(TRAINING, {}).get(1, math.nan)
    return first, tuple(sorted(values.get(VALIDATION, {}).items()))


def has_diverged(first: float, curve: tuple[tuple[int, float], ...], died_of_nan: bool) -> bool:
    """Whether a run diverged, which is a result and not an error."""
    if died_of_nan or not curve:
        return died_of_nan
    last = curve[-1][1]
    return not math.isfinite(last) or last > first


def read_done(run: Run) -> dict[str, Any] | None:
    """The record of a finished run, or None if it is missing or is not one."""
    path = run.folder / DONE
    try:
        if path.stat().st_size > _MAX_RECORD_BYTES:
            return None
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return record if _is_record(record) else None


def _is_record(record: Any) -> bool:
    """Whether a JSON document has what `write_done` writes."""
    if not isinstance(record, dict) or record.get("version") != _RECORD_VERSION:
        return False
    seconds, settings = record.get("seconds"), record.get("settings")
    versions = record.get("environment", {})
    return (
        isinstance(record.get("digest"), str)
        and isinstance(settings, list)
        and all(isinstance(word, str) for word in settings)
        and isinstance(record.get("died_of_nan"), bool)
        and isinstance(seconds, (int, float))
        and 0 <= seconds < math.inf
        and isinstance(versions, dict)
        and all(isinstance(version, str) for version in versions.values())
    )


def write_done(run: Run, *, died_of_nan: bool, seconds: float, **more: Any) -> None:
    """Record that a run is done. The record is complete or absent."""
    record = {
        "version": _RECORD_VERSION,
        "digest": run.digest,
        "settings": list(run.settings),
        "died_of_nan": died_of_nan,
        "seconds": round(seconds, 2),
        **more,
    }
    with replaced_file(run.folder / DONE) as partial:
        partial.write_text(json.dumps(record, indent=1), encoding="utf-8")


def read_result(run: Run) -> Result | None:
    """The result of a finished run, or None if it is not done or had different settings."""
    record = read_done(run)
    if record is None or record["digest"] != run.digest:
        return None
    first, curve = losses(run.folder)
    diverged = has_diverged(first, curve, bool(record["died_of_nan"]))
    environment = dict(record.get("environment", {}))
    return Result(run, first, curve, diverged, float(record["seconds"]), environment)
