"""Results that Megatron computes again in every run of one process, from the same input.

They take half of the time of a small run: the help texts of its flags, and the shuffled indices of
the mock dataset.
"""

import functools
import gc
from typing import Any

import megatron.core.datasets.gpt_dataset as gpt_dataset
import numpy as np
from megatron.training.argument_utils import ArgumentGroupFactory


@functools.cache
def memoize() -> None:
    """Memoize both, and exclude all imported modules from garbage collection. Once per process."""
    factory: Any = ArgumentGroupFactory
    plain = factory._get_field_docstrings
    # It uses nothing of the factory except itself, for parent classes.
    docstrings = functools.cache(lambda kind: plain(factory.__new__(factory), kind))
    factory._get_field_docstrings = lambda self, kind: dict(docstrings(kind))
    _memoize_shuffles()
    gc.collect()
    gc.freeze()


def _memoize_shuffles() -> None:
    build = gpt_dataset._build_shuffle_index
    known: dict[Any, tuple[Any, Any]] = {}

    def build_shuffle_index(samples: int, size: int, generator: np.random.RandomState) -> Any:
        state: Any = generator.get_state()
        _, keys, position, *rest = state
        key = (samples, size, keys.tobytes(), position, *rest)
        if key not in known:
            known[key] = (build(samples, size, generator), generator.get_state())
        index, after = known[key]
        generator.set_state(after)
        return index

    gpt_dataset._build_shuffle_index = build_shuffle_index
