"""YAML files of users: plain values without repeated keys, read in bounded time and memory."""

from pathlib import Path
from typing import Any

import yaml

from megatron_llr.errors import first_line, shown

_MAX_BYTES = 256 * 2**10
# Keys of one mapping after `<<` merges. Merges of merges double the keys of every level.
_MAX_KEYS = 500
_MAX_DEPTH = 20


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.depth += 1
        if self.depth > _MAX_DEPTH:
            problem = f"nested more than {_MAX_DEPTH} deep"
            raise yaml.composer.ComposerError(None, None, problem, self.peek_event().start_mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def flatten_mapping(self, node: Any) -> None:
        # Before merged keys are among them, which a key of the mapping itself overrides.
        given = set()
        for key, _ in node.value:
            word = (key.tag, key.value) if isinstance(key, yaml.ScalarNode) else None
            if word in given:
                problem = f"the key {shown(key.value)} is given twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            given.update([word] if word else [])
        super().flatten_mapping(node)
        if len(node.value) > _MAX_KEYS:
            problem = f"more than {_MAX_KEYS} keys in a mapping"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


def read_yaml(path: Path) -> Any:
    """The document in a YAML file: plain Python values.

    Aliases are references to one object, so a document is never larger than its file.

    Raises:
        ValueError: if the file cannot be read, is not YAML, or repeats a key of a mapping. The text
            is the reason with its line, for the caller's message.
    """
    try:
        if path.exists() and not path.is_file():
            raise ValueError("it is not a regular file")
        if path.stat().st_size > _MAX_BYTES:
            raise ValueError(f"it is larger than {_MAX_BYTES} bytes")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as broken:
        raise ValueError(str(broken)) from broken
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as broken:
        mark = broken.problem_mark or broken.context_mark
        line = f"line {mark.line + 1}: " if mark else ""
        raise ValueError(f"{line}{broken.problem or broken.context}") from broken
    except Exception as broken:
        # Of values that PyYAML takes for dates or numbers: ValueError, OverflowError; with a tag
        # such as !!int also KeyError, IndexError and AttributeError.
        raise ValueError(f"{type(broken).__name__}: {first_line(broken)[:200]}") from broken
