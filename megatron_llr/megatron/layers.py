"""Where the blocks of a model are: name of a layer's module -> its block in matrix ids.

Block numbers are global: pipeline stages, virtual stages and custom layouts are resolved by
Megatron's own layer numbers.
"""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_llr.matrices.ids import BLOCK, PREDICTION, MatrixId

_LAYER = re.compile(r"^decoder\.layers\.\d+$")
_PREDICTION = re.compile(r"^mtp\.layers\.\d+$")
_INNER = "mtp_model_layer"

# What a layer of a hybrid model is, by its letter in `--hybrid-layer-pattern`
# (megatron/core/models/hybrid/hybrid_layer_allocation.py), in the words of matrix ids.
_MIXERS = {"M": "mamba", "G": "attention", "*": "attention", "D": "attention", "+": "attention"}
_KINDS = {**_MIXERS, "-": "mlp", "E": "mlp"}


@dataclass(frozen=True, slots=True)
class Scope:
    """A layer, as matrix ids see it.

    Attributes:
        container: block or multi-token prediction layer that it belongs to: `block.3`, `mtp.0`.
        ordinal: 2 in the second layer of its kind within the container, whose ids say `mlp2`.
    """

    container: str
    ordinal: int = 1

    def matrix_id(self, weight: str, module: str = "", expert: int | None = None) -> MatrixId:
        """Id of one of its weights.

        Args:
            weight: last word of the id.
            module: as the weight tables name it: `mlp.expert`.
            expert: global number of its expert.
        """
        if self.ordinal > 1:
            kind, dot, inner = module.partition(".")
            module = f"{kind}{self.ordinal}{dot}{inner}"
        return MatrixId(weight, container=self.container, module=module, expert=expert)


def hybrid_scopes(letters: str, container: str | None = None) -> list[Scope]:
    """The layers of a hybrid model: a block begins at every mixer, the others belong to the last.

    Layers before the first mixer belong to the first block.

    Args:
        letters: one for every layer of the whole model, pipeline stages joined.
        container: what all of them belong to, instead of blocks.
    """
    scopes: list[Scope] = []
    block, seen = 0, Counter[str]()
    for letter in letters:
        if letter in _MIXERS and container is None and not seen.keys().isdisjoint(_MIXERS.values()):
            block, seen = block + 1, Counter[str]()
        seen[_KINDS[letter]] += 1
        scopes.append(Scope(container or f"{BLOCK}.{block}", seen[_KINDS[letter]]))
    return scopes


def find_scopes(model: Any) -> dict[str, Scope]:
    """Name of every layer in a chunk -> its scope.

    Args:
        model: GPTModel or HybridModel, unwrapped.
    """
    # GPTModel has no pattern: every layer is a block.
    main, *predictions = (getattr(model, "hybrid_layer_pattern", None) or "").split("/")
    hybrid = hybrid_scopes(main.replace("|", ""))
    scopes: dict[str, Scope] = {}
    for name, module in model.named_modules():
        if _LAYER.match(name):
            # layer_number counts from 1, over all stages.
            number = int(module.layer_number) - 1
            scopes[name] = hybrid[number] if hybrid else Scope(f"{BLOCK}.{number}")
        elif _PREDICTION.match(name):
            container = f"{PREDICTION}.{int(module.layer_number) - 1}"
            scopes[name] = Scope(container)
            inner = f"{name}.{_INNER}"
            if predictions:
                for index, scope in enumerate(hybrid_scopes(predictions[0], container)):
                    scopes[f"{inner}.layers.{index}"] = scope
            else:
                scopes[inner] = Scope(container)
    return scopes


def split_name(name: str, scopes: Mapping[str, Scope]) -> tuple[Scope, str] | None:
    """The innermost layer that holds a weight, and the weight's name below it; None outside.

    Args:
        name: name of the weight in the chunk.
        scopes: as `find_scopes` gives them.
    """
    end = name.rfind(".")
    while end > 0:
        scope = scopes.get(name[:end])
        if scope is not None:
            return scope, name[end + 1 :]
        end = name.rfind(".", 0, end)
    return None
