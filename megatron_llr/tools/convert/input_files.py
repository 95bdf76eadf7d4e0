"""JSON files and names from folders that are not trusted."""

import json
from pathlib import Path, PurePath
from typing import Any

from megatron_llr.errors import input_error

_MAX_JSON_BYTES = 256 * 2**20


def plain_name(name: object) -> bool:
    """Whether it is the name of a file in a folder, without a path to another folder."""
    if not isinstance(name, str) or name in ("", ".", "..") or not name.isprintable():
        return False
    return PurePath(name).name == name and "\\" not in name


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ValueError: if the file is missing or is not a JSON object.
    """
    try:
        if path.exists() and not path.is_file():
            raise ValueError("not a regular file")
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise ValueError(f"larger than {_MAX_JSON_BYTES} bytes")
        document = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(document, dict):
            raise ValueError("not a JSON object")
    except RecursionError as broken:
        raise input_error(
            f"Cannot read {path}: it is nested too deeply. It must be a JSON object. Copy the "
            "folder again."
        ) from broken
    except (OSError, ValueError) as broken:
        raise input_error(
            f"Cannot read {path}: {str(broken)[:200]}. It must be a JSON object. Copy the folder "
            "again."
        ) from broken
    return document
