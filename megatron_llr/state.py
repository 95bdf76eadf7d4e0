"""The extension's state as a small JSON document, versioned; what a checkpoint carries."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from megatron_llr.config import LLRConfig, flag
from megatron_llr.errors import user_error
from megatron_llr.records import Directory

VERSION = 1
KEY = "megatron_llr"
"""Key of the document in the scheduler's state dict; always present, so that every checkpoint
format finds the same structure."""


def encode(document: Mapping[str, Any]) -> str:
    """The document as one string: plain for any checkpoint format, floats exact."""
    return json.dumps(document, separators=(",", ":"), allow_nan=False)


def decode(text: str | None) -> dict[str, Any] | None:
    """The document in a checkpoint, or None where there is none.

    Raises:
        ValueError: if the text is not a document of this package.
    """
    if not text:
        return None
    try:
        document = json.loads(text)
        int(document["version"])
    except (TypeError, KeyError, ValueError) as broken:
        raise user_error(
            "the checkpoint's extension state cannot be read",
            got=repr(text[:60]),
            allowed=f"a JSON document of version up to {VERSION}",
            remedy=f"{flag('reset_state')} starts the multipliers afresh",
        ) from broken
    return dict(document)


def digest(document: Mapping[str, Any] | None) -> str:
    """A few words that tell one document from another."""
    if document is None:
        return "none"
    code = hashlib.sha256(encode(document).encode()).hexdigest()[:12]
    return f"that of update {document['next_update']} ({code})"


def _some(names: set[str]) -> str:
    listed = sorted(names)
    more = f" and {len(listed) - 3} more" if len(listed) > 3 else ""
    return (", ".join(listed[:3]) + more) or "none"


def check(document: Mapping[str, Any], config: LLRConfig, directory: Directory) -> list[str]:
    """Refuse a document that this run cannot go on from.

    Args:
        document: as `decode` gives it.
        config: settings of this run.
        directory: matrices of this run.

    Returns:
        A line for every setting that differs and may.

    Raises:
        ValueError: if the version is newer, the matrices are others, or a setting that gives the
            saved multipliers their meaning has changed.
    """
    remedy = f"{flag('reset_state')} drops the saved state and starts the multipliers afresh"
    if int(document["version"]) > VERSION:
        raise user_error(
            "the checkpoint's extension state is of a newer version",
            got=document["version"],
            allowed=f"up to {VERSION}",
            remedy=f"install a newer megatron-llr; {remedy}",
        )
    saved, here = set(document["matrices"]), set(directory)
    if saved != here:
        raise user_error(
            "the checkpoint's extension state names other matrices",
            got=f"only there: {_some(saved - here)}; only here: {_some(here - saved)}",
            allowed="the matrices of this model",
            remedy=remedy,
        )
    meaning = config.meaning()
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
    return [
        f"{flag(field)} is {timing[field]}, was {value} when the state was saved"
        for field, value in document["timing"].items()
        if field in timing and timing[field] != value
    ]
