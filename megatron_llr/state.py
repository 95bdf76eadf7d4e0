"""The extension's state in a checkpoint: a small JSON document with a version."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from megatron_llr.config import LLRConfig, flag, settings_of
from megatron_llr.errors import input_error, shown
from megatron_llr.matrices.info import MatrixIndex
from megatron_llr.output import and_more

VERSION = 2
"""Version of the document: a list of matrix ids, and lists of numbers in its order."""
KEY = "megatron_llr"
"""Key of the document in the scheduler's state dict; always present, so that every checkpoint
format finds the same structure."""

# In such a list, marks a matrix that the table does not name. Null is a NaN.
_UNNAMED = False

_RESET = f"use {flag('reset_state')} to drop the saved state and start the multipliers again from 1"


def encode(document: Mapping[str, Any]) -> str:
    """The document as one string, which any checkpoint format can store; floats are exact.

    Tables by matrix id become lists in the order of `matrices`: with thousands of experts most of
    the document would be ids.
    """
    matrices = document["matrices"]
    tables = {
        name: [table.get(matrix, _UNNAMED) for matrix in matrices] if table else {}
        for name, table in _tables(document).items()
    }
    packed = {**_with_tables(document, tables), "version": VERSION}
    return json.dumps(packed, separators=(",", ":"), allow_nan=False)


def decode(text: str | None) -> dict[str, Any] | None:
    """The document in a checkpoint, or None where there is none.

    Raises:
        ValueError: if the text is not a document of this package.
    """
    if not isinstance(text, str | None):
        raise _unreadable(shown(text))
    if not text:
        return None
    try:
        document = json.loads(text)
        if int(document["version"]) != VERSION:
            return dict(document)  # refused by `check`
        matrices = document["matrices"]
        tables = {}
        for name, listed in _tables(document).items():
            named = zip(matrices, listed, strict=True) if listed else ()
            tables[name] = {matrix: value for matrix, value in named if value is not _UNNAMED}
        return _with_tables(document, tables)
    except (
        *(AttributeError, KeyError, OverflowError, RecursionError, TypeError, ValueError),
    ) as broken:
        raise _unreadable(f"it begins with {text[:60]!r}") from broken


def _unreadable(what: str) -> ValueError:
    return input_error(
        f"The extension's state in the checkpoint cannot be read: {what}. It must be a JSON "
        f"document of version {VERSION}. To continue, {_RESET}."
    )


def require_valid(document: Mapping[str, Any]) -> None:
    """Refuse a document without the values that `controller.state_dict` writes.

    Raises:
        ValueError: naming its version, or the values.
    """
    version = document.get("version")
    if version != VERSION:
        raise input_error(
            f"The extension's state in the checkpoint has version {shown(version)}. This "
            f"package reads version {VERSION}. Install the megatron-llr that wrote it, or {_RESET}."
        )
    schedule = document.get("schedule")
    schedule = schedule if isinstance(schedule, Mapping) else {}
    matrices: Any = document.get("matrices")
    texts = isinstance(matrices, list) and all(isinstance(matrix, str) for matrix in matrices)
    known = set(matrices) if texts else set()
    observed_at = schedule.get("observed_at")
    old: Any = schedule.get("old")
    new: Any = schedule.get("new")
    valid = {
        "matrices": texts and len(known) == len(matrices or ()),
        "next_update": _is_whole(document.get("next_update"), 1),
        "meaning": isinstance(document.get("meaning"), Mapping),
        "timing": isinstance(document.get("timing"), Mapping),
        "schedule.start": _is_whole(schedule.get("start"), 1),
        "schedule.window_end": _is_whole(schedule.get("window_end"), 0),
        "schedule.ramp": _is_whole(schedule.get("ramp"), 0),
        "schedule.observed_at": "observed_at" in schedule
        and (observed_at is None or _is_whole(observed_at, 1)),
        "schedule.old": _is_table(old, known),
        "schedule.new": _is_table(new, known) and isinstance(old, Mapping) and set(new) == set(old),
        "alphas": _is_table(document.get("alphas"), known, least=-(2.0**1000), unknown=True),
        "radii": _is_table(document.get("radii", {}), known),
    }
    wrong = [name for name, is_valid in valid.items() if not is_valid]
    if wrong:
        raise _unreadable(f"its {', '.join(wrong)} cannot be those of a run")


def _is_whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < 2**63


def _is_table(value: Any, known: set[str], *, least: float = 0, unknown: bool = False) -> bool:
    """Whether it maps matrix ids to finite numbers from `least`, or to None if `unknown`."""
    return (
        isinstance(value, Mapping)
        and set(value) <= known
        and all(
            (number is None and unknown)
            or (
                isinstance(number, int | float)
                and not isinstance(number, bool)
                and least <= number < 2.0**1000
            )
            for number in value.values()
        )
    )


def _tables(document: Mapping[str, Any]) -> dict[str, Any]:
    """The tables by matrix id in a document."""
    schedule = document["schedule"]
    tables = {"old": schedule["old"], "new": schedule["new"], "alphas": document["alphas"]}
    return {**tables, "radii": document.get("radii", {})}


def _with_tables(document: Mapping[str, Any], tables: Mapping[str, Any]) -> dict[str, Any]:
    """The document with other tables by matrix id."""
    schedule = {**document["schedule"], "old": tables["old"], "new": tables["new"]}
    return {**document, "schedule": schedule, "alphas": tables["alphas"], "radii": tables["radii"]}


def digest(document: Mapping[str, Any] | None) -> str:
    """A short text that differs between documents: the next update and a hash."""
    if document is None:
        return "none"
    code = hashlib.sha256(encode(document).encode()).hexdigest()[:12]
    return f"that of update {document['next_update']} ({code})"


def check(
    document: Mapping[str, Any],
    config: LLRConfig,
    matrix_index: MatrixIndex,
    meaning: Mapping[str, Any],
) -> list[str]:
    """Refuse a document that this run cannot continue from.

    Args:
        document: from `decode`.
        config: settings of this run.
        matrix_index: matrices of this run.
        meaning: what this run's state would save as its meaning.

    Returns:
        A line for every setting that differs and is allowed to.

    Raises:
        ValueError: if the version or the matrices differ, or a setting that gives the saved
            multipliers their meaning has changed.
    """
    require_valid(document)
    saved, here = set(document["matrices"]), set(map(str, matrix_index))
    if saved != here:
        only_saved = and_more(sorted(saved - here), 3) or "none"
        only_here = and_more(sorted(here - saved), 3) or "none"
        raise input_error(
            "The extension's state in the checkpoint has other matrices than this model. Only in "
            f"the checkpoint: {only_saved}. Only in the model: {only_here}. Load a checkpoint of "
            f"the same model, or {_RESET}."
        )
    changed = {
        field: (value, meaning[field])
        for field, value in document["meaning"].items()
        if field in meaning and meaning[field] != value
    }
    if changed:
        field, (before, now) = next(iter(changed.items()))
        rest = ", ".join(flag(other) for other in changed if other != field)
        # A table is given as a file, whose path is not saved.
        saved_value = "a table with that content" if field == "role_table" else before
        raise input_error(
            f"{flag(field)} is {now}, but the checkpoint was saved with {before}, and its "
            f"multipliers would mean something else. {f'{rest} also differ. ' if rest else ''}"
            f"Set {flag(field)} {saved_value}, or {_RESET}."
        )
    timing = config.timing()
    kept = f"the saved window, to update {document['schedule']['window_end']}, is kept"
    return [
        f"{flag(field)} {timing[field]} has no effect (was {value}): {kept}"
        if field in settings_of(LLRConfig, "window")
        else f"{flag(field)} is {timing[field]}, was {value} when the state was saved"
        for field, value in document["timing"].items()
        if field in timing and timing[field] != value
    ]
