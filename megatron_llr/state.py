"""The extension's state as a small JSON document, versioned; what a checkpoint carries."""

import hashlib
import json
from collections.abc import Callable, Collection, Mapping
from typing import Any

from megatron_llr.config import LLRConfig, flag, settings_of
from megatron_llr.errors import user_error
from megatron_llr.matrices.info import MatrixIndex

VERSION = 2
"""Of the form that a checkpoint holds: a list of matrix ids, and lists of numbers in its order."""
KEY = "megatron_llr"
"""Key of the document in the scheduler's state dict; always present, so that every checkpoint
format finds the same structure."""

# In a list beside the ids: a matrix that the table does not name. Null is a number that is none.
_UNNAMED = False


def encode(document: Mapping[str, Any]) -> str:
    """The document as one string: plain for any checkpoint format, floats exact.

    Tables by matrix id become lists in the order of `matrices`: with thousands of experts most of
    the document would be ids.
    """
    matrices = document["matrices"]

    def listed(table: Mapping[str, Any]) -> Any:
        if not table:
            return {}
        return [table.get(matrix, _UNNAMED) for matrix in matrices]

    packed = {**_tables(document, listed), "version": VERSION}
    return json.dumps(packed, separators=(",", ":"), allow_nan=False)


def decode(text: str | None) -> dict[str, Any] | None:
    """The document in a checkpoint, or None where there is none.

    Raises:
        ValueError: if the text is not a document of this package.
    """
    if not text:
        return None
    try:
        document = json.loads(text)
        # Another version is refused by `check`.
        return dict(document) if int(document["version"]) != VERSION else _unlisted(document)
    except (TypeError, KeyError, ValueError) as broken:
        raise user_error(
            "the checkpoint's extension state cannot be read",
            got=repr(text[:60]),
            allowed=f"a JSON document of version {VERSION}",
            remedy=f"{flag('reset_state')} starts the multipliers afresh",
        ) from broken


def _unlisted(document: Mapping[str, Any]) -> dict[str, Any]:
    def table(listed: Any) -> dict[str, Any]:
        if not listed:
            return {}
        named = zip(document["matrices"], listed, strict=True)
        return {matrix: value for matrix, value in named if value is not _UNNAMED}

    return _tables(document, table)


def _tables(document: Mapping[str, Any], change: Callable[[Any], Any]) -> dict[str, Any]:
    """The document with another form of its tables by matrix id."""
    schedule = document["schedule"]
    return {
        **document,
        "schedule": {**schedule, "old": change(schedule["old"]), "new": change(schedule["new"])},
        "alphas": change(document["alphas"]),
    }


def digest(document: Mapping[str, Any] | None) -> str:
    """A few words that tell one document from another."""
    if document is None:
        return "none"
    code = hashlib.sha256(encode(document).encode()).hexdigest()[:12]
    return f"that of update {document['next_update']} ({code})"


def _some(names: Collection[str]) -> str:
    listed = sorted(names)
    more = f" and {len(listed) - 3} more" if len(listed) > 3 else ""
    return (", ".join(listed[:3]) + more) or "none"


def check(
    document: Mapping[str, Any],
    config: LLRConfig,
    matrix_index: MatrixIndex,
    meaning: Mapping[str, Any],
) -> list[str]:
    """Refuse a document that this run cannot go on from.

    Args:
        document: as `decode` gives it.
        config: settings of this run.
        matrix_index: matrices of this run.
        meaning: what this run's state would keep as its meaning.

    Returns:
        A line for every setting that differs and may.

    Raises:
        ValueError: if the version is another, the matrices are others, or a setting that gives the
            saved multipliers their meaning has changed.
    """
    remedy = f"{flag('reset_state')} drops the saved state and starts the multipliers afresh"
    if int(document["version"]) != VERSION:
        raise user_error(
            "the checkpoint's extension state is of another version",
            got=document["version"],
            allowed=f"version {VERSION}",
            remedy=f"install the megatron-llr that wrote it; {remedy}",
        )
    saved, here = set(document["matrices"]), set(map(str, matrix_index))
    if saved != here:
        raise user_error(
            "the checkpoint's extension state names other matrices",
            got=f"only there: {_some(saved - here)}; only here: {_some(here - saved)}",
            allowed="the matrices of this model",
            remedy=remedy,
        )
    changed = {
        field: (value, meaning[field])
        for field, value in document["meaning"].items()
        if field in meaning and meaning[field] != value
    }
    if changed:
        field, (before, now) = next(iter(changed.items()))
        rest = ", ".join(flag(other) for other in changed if other != field)
        raise user_error(
            f"{flag(field)} differs from the checkpoint's and would change what it means",
            got=f"{now} (also {rest})" if rest else now,
            allowed=str(before),
            remedy=f"restore the value, or {remedy}",
        )
    timing = config.timing()
    kept = f"the saved window to update {document['schedule']['window_end']} holds"
    return [
        f"{flag(field)} {timing[field]} is not taken (was {value}): {kept}"
        if field in settings_of(LLRConfig, "window")
        else f"{flag(field)} is {timing[field]}, was {value} when the state was saved"
        for field, value in document["timing"].items()
        if field in timing and timing[field] != value
    ]
