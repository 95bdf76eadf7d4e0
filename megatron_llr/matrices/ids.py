"""`MatrixId`: the canonical name of a logical matrix, with its block, role and expert."""

import re
from collections.abc import Mapping

# Embedding-like matrices: their multiplier follows --llr-embedding, never the mapping.
EMBEDDING_IDS = frozenset({"embedding", "position_embedding", "head"})

# The roles in the order in which data passes through a block. Experts and shared experts have roles
# of their own: `expert.up` is not the `up` of a dense block.
ROLES = tuple(
    "embedding position_embedding eh_proj in_proj out_proj q_down q_up kv_down kv_up q k v "
    "attention.gate o router gate up down shared.mix shared.gate shared.up shared.down latent_down "
    "expert.gate expert.up expert.down latent_up head".split()
)
ROUTER = "router"

BLOCK = "block"
PREDICTION = "mtp"
_CONTAINERS = (BLOCK, PREDICTION)

_GRAMMAR = re.compile(
    r"(?:(?P<container>block|mtp)\.(?P<number>\d+)\.)?"
    r"(?:(?P<module>(?:attention|mlp|mamba)\d*(?:\.shared|\.expert(?=\.\d))?)\.)?"
    r"(?:(?P<expert>\d+)\.)?"
    r"(?P<weight>[a-z]\w*)"
)


class MatrixId(str):
    """The canonical name of a logical matrix: a string that also knows its parts.

    Being a string, it indexes a table that was read from JSON, and a string indexes a table of
    ids. It is made once, where the model is walked; `str()` gives the plain string that files hold.

    Attributes:
        container: `block.3`, `mtp.0`, or empty for embedding and head.
        block: global number of its block; None outside the blocks.
        module: module within the container, as `attention`, `mlp2`, `mlp.expert`; may be empty.
        expert: global number of its expert, or None.
        role: what it is for, the same in every block and for every expert: one of `ROLES`.
        order: sort key of the model: embedding, blocks by number, multi-token prediction, head;
            within a block by role, experts one after the other. `sorted()` uses it.
    """

    __slots__ = ("block", "container", "expert", "module", "order", "role", "weight")

    block: int | None
    container: str
    expert: int | None
    module: str
    order: tuple[int, int, int, int, int, str]
    role: str
    weight: str

    def __new__(
        cls, weight: str, *, container: str = "", module: str = "", expert: int | None = None
    ) -> "MatrixId":
        """An id from its parts.

        Args:
            weight: last word of the id, as `q`, `down`, `embedding`.
            container: `block.3` or `mtp.0`; empty for embedding and head.
            module: module within the container, as `attention`, `mlp2`, `mlp.shared`.
            expert: global number of the expert; the module is then `mlp.expert`.
        """
        number = "" if expert is None else str(expert)
        words = (container, module, number, weight)
        self = super().__new__(cls, ".".join(word for word in words if word))
        self.container, self.module, self.expert, self.weight = container, module, expert, weight
        kind, _, index = container.partition(".")
        self.block = int(index) if kind == BLOCK else None
        self.role = _role(module, weight)
        self.order = self._order(kind, int(index or 0))
        return self

    @classmethod
    def read(cls, text: str) -> "MatrixId":
        """The id that a file names.

        Raises:
            ValueError: if the text is no matrix id.
        """
        match = _GRAMMAR.fullmatch(text)
        if match is None:
            raise ValueError(f"{text!r} is not a matrix id such as block.3.attention.q")
        kind, number, module, expert, weight = match.groups()
        return cls(
            weight,
            container=f"{kind}.{number}" if kind else "",
            module=module or "",
            expert=None if expert is None else int(expert),
        )

    def sibling(self, weight: str) -> "MatrixId":
        """The id with another last word: `block.3.attention.qkv` gives `block.3.attention.k`."""
        return MatrixId(weight, container=self.container, module=self.module, expert=self.expert)

    def _order(self, kind: str, number: int) -> tuple[int, int, int, int, int, str]:
        if kind in _CONTAINERS:
            place = 1 + _CONTAINERS.index(kind)
        else:
            place = 0 if self in EMBEDDING_IDS and self != "head" else 1 + len(_CONTAINERS)
        rank = ROLES.index(self.role) if self.role in ROLES else len(ROLES)
        if self.expert is None:
            return (place, number, rank, -1, -1, str(self))
        return (place, number, ROLES.index("expert.gate"), self.expert, rank, str(self))

    def __lt__(self, other: str) -> bool:
        if isinstance(other, MatrixId):
            return self.order < other.order
        return super().__lt__(other)

    def __getnewargs_ex__(self) -> tuple[tuple[str], dict[str, str | int | None]]:
        parts = {"container": self.container, "module": self.module, "expert": self.expert}
        return (self.weight,), parts


def _role(module: str, weight: str) -> str:
    """`expert.up`, `shared.up` and `attention.gate` are roles of their own."""
    kind, _, inner = module.partition(".")
    if inner:
        return f"{inner}.{weight}"
    if weight == "gate" and kind.startswith("attention"):
        return f"attention.{weight}"
    return weight


def value_for_role(table: Mapping[str, float], matrix: MatrixId, default: float) -> float:
    """The value that a table of roles has for a matrix.

    `up` applies to `expert.up` and `shared.up` too, unless the table names them.

    Args:
        table: role -> value.
        matrix: matrix id.
        default: value of roles that the table does not name.
    """
    general = matrix.role.removeprefix("expert.").removeprefix("shared.")
    return table.get(matrix.role, table.get(general, default))
