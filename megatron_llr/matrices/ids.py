"""Matrix ids: the canonical names of logical matrices, their blocks, roles and order."""

import functools
import re
from collections.abc import Mapping

# Embedding-like matrices: their multiplier follows --llr-embedding, never the mapping.
EMBEDDING_IDS = frozenset({"embedding", "position_embedding", "head"})

# The order in which roles are listed, that of the data's way through a block. Shared experts and
# experts have roles of their own: `expert.up` is another thing than the `up` of a dense block.
ROLES = tuple(
    "embedding position_embedding eh_proj in_proj out_proj q_down q_up kv_down kv_up q k v "
    "attention.gate o router gate up down shared.mix shared.gate shared.up shared.down latent_down "
    "expert.gate expert.up expert.down latent_up head".split()
)
ROUTER = "router"

_FIRST_NUMBER = re.compile(r"^(.*?\.)?(\d+)(?:\.|$)")
_EXPERT = re.compile(r"\.expert\.(\d+)\.")
_QUALIFIED = re.compile(r"\.(?:(attention)\d*\.(gate)|(shared)\.(\w+)|(expert)\.\d+\.(\w+))$")
_PLACES = ("block.", "mtp.")


def block_key(matrix: str) -> str:
    """What tells one block from another in a matrix id: all up to its first number.

    `block.3.mlp.up` gives `block.3`; ids outside the blocks (`embedding`) give themselves. Names of
    Hugging Face modules (`model.layers.3.mlp.up_proj`) work alike.
    """
    found = _FIRST_NUMBER.match(matrix)
    return f"{found[1] or ''}{found[2]}" if found else matrix


def block_of(matrix: str) -> int | None:
    """Global number of the block that a matrix id names, or None outside the blocks."""
    found = _FIRST_NUMBER.match(matrix)
    return int(found[2]) if found and found[1] == "block." else None


@functools.cache
def role_of(matrix: str) -> str:
    """What the matrix is for: one of `ROLES`, the same in every block and for every expert.

    The last word of its id (`q`, `down`, `embedding`), with the word before it where that makes it
    another role: `attention.gate`, `shared.up`, `expert.up`.
    """
    found = _QUALIFIED.search(matrix)
    if found:
        return ".".join(word for word in found.groups() if word)
    return matrix.rsplit(".", 1)[-1]


def value_for_role(table: Mapping[str, float], matrix: str, default: float) -> float:
    """What a table of roles says of a matrix; `up` speaks for `expert.up` and `shared.up` too,
    where the table does not name them.

    Args:
        table: role -> value.
        matrix: matrix id.
        default: value of roles that the table does not name.
    """
    role = role_of(matrix)
    general = role.removeprefix("expert.").removeprefix("shared.")
    return table.get(role, table.get(general, default))


def expert_of(matrix: str) -> int | None:
    """Global number of the expert that a matrix id names, or None."""
    found = _EXPERT.search(matrix)
    return int(found[1]) if found else None


def model_order(matrix: str) -> tuple[int, int, int, int, str]:
    """Sort key of a matrix id: embedding, the blocks by number, multi-token prediction, head.

    Within a block by role, experts one after the other.
    """
    found = _FIRST_NUMBER.match(matrix)
    if found and found[1] in _PLACES:
        place, number = 1 + _PLACES.index(found[1]), int(found[2])
    else:
        place, number = 0 if "embedding" in matrix else len(_PLACES) + 1, 0
    role, expert = role_of(matrix), expert_of(matrix)
    rank = ROLES.index(role) if role in ROLES else len(ROLES)
    if expert is not None:
        return (place, number, ROLES.index("expert.gate"), expert, f"{rank:02d}")
    return (place, number, rank, -1, matrix)
