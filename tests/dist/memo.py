"""Many runs in one process: what Megatron works out anew for each, from the same input, once.

Half of a small run's time goes there. Both are pure: help texts of dataclasses, and shuffles of the
mock dataset from a given state of the random generator.
"""

import functools
import gc
from typing import Any

import megatron.core.datasets.gpt_dataset as gpt_dataset
import numpy as np
from megatron.training.argument_utils import ArgumentGroupFactory


def remember() -> None:
    """Memoise them, and keep the garbage collector from walking through all imported modules."""
    factory: Any = ArgumentGroupFactory
    plain = factory._get_field_docstrings
    # It asks nothing of the factory but itself, for parent classes.
    docstrings = functools.cache(lambda kind: plain(factory.__new__(factory), kind))
    factory._get_field_docstrings = lambda self, kind: dict(docstrings(kind))
    gpt_dataset._build_shuffle_index = _shuffles(gpt_dataset._build_shuffle_index)
    gc.collect()
    gc.freeze()


def _shuffles(build: Any) -> Any:
    known: dict[Any, tuple[Any, Any]] = {}

    def build_shuffle_index(samples: int, size: int, generator: np.random.RandomState) -> Any:
        _, keys, position, *rest = generator.get_state()
        key = (samples, size, keys.tobytes(), position, *rest)
        if key not in known:
            known[key] = (build(samples, size, generator), generator.get_state())
        index, after = known[key]
        generator.set_state(after)
        return index

    return build_shuffle_index
