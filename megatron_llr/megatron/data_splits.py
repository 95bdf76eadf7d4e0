"""Checks that every split of the data has what a run reads from it, before Megatron builds it.

Megatron repeats a split until it has enough tokens. With a split of no tokens that loop does not
end, even if the run needs no samples from it (`GPTDataset._get_num_epochs`).
"""

import os
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch.distributed as dist
from megatron.core.datasets.blended_megatron_dataset_config import (
    convert_split_vector_to_split_matrix,
    parse_and_normalize_split,
)
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.object_storage_utils import is_object_storage_path

from megatron_llr.errors import input_error
from megatron_llr.ranks import gather_objects, together

SPLITS = ("training", "validation", "test")

DEFAULT_SPLIT = "969,30,1"
"""Megatron's --split if only --data-path is given (`validate_args`)."""

Bounds = tuple[float, float] | None
Blend = tuple[Sequence[str], Sequence[float] | None] | None


def documents_in(bounds: Bounds, documents: int) -> tuple[int, int]:
    """First document of a split and the one after its last, rounded as Megatron rounds them."""
    if bounds is None:
        return 0, 0
    first, last = (round(bound * float(documents)) for bound in bounds)
    return first, last


def split_bounds(split: str) -> list[Bounds]:
    """Where each of the three splits begins and ends, from 0 to 1; None for an absent one.

    Raises:
        ValueError: if the value of --split is not up to three weights.
    """
    try:
        vector = parse_and_normalize_split(split)
    except AssertionError:
        vector = [np.nan]
    if not np.isfinite(vector).all():
        raise input_error(
            f"--split {split} is not valid. It must be the weights of the training, validation and "
            "test split, of which at least one is above 0: for instance --split 99,1,0."
        )
    return list(convert_split_vector_to_split_matrix(vector))


@dataclass(frozen=True)
class _Split:
    """One split of the data.

    Attributes:
        index: position in SPLITS.
        bounds: where the split begins and ends in each data set, from 0 to 1.
        blend: paths of the data sets, and their weights.
        samples: samples that the run asks for; None for one pass over the data.
        is_read: whether the run reads them.
    """

    index: int
    bounds: Bounds
    blend: Blend
    samples: int | None
    is_read: bool

    @property
    def is_absent(self) -> bool:
        return self.bounds is None or self.blend is None


def default_split_leaves_empty(documents: int) -> list[str]:
    """Splits without documents under Megatron's default --split."""
    empty = []
    for name, bounds in zip(SPLITS, split_bounds(DEFAULT_SPLIT), strict=True):
        first, last = documents_in(bounds, documents)
        if first == last:
            empty.append(name)
    return empty


def suggested_split(documents: int) -> str:
    """Flags for a data set: about 3 % of the documents for validation, at least one."""
    if documents == 1:
        return "--split 1,0,0 --eval-iters 0"
    held_out = max(1, round(0.03 * documents))
    return f"--split {documents - held_out},{held_out},0"


def empty_splits(
    args: Namespace,
    blend: Blend,
    blend_per_split: Sequence[Blend] | None,
    num_samples: Sequence[int | None],
) -> list[int]:
    """Splits without data that the run does not read: they must not be built. Enter on all ranks.

    Args:
        args: Megatron's.
        blend: data sets of all splits, as `get_blend_and_blend_per_split` returns them.
        blend_per_split: data sets of each split, if they are not the same.
        num_samples: samples that Megatron asks of each split; None for one pass.

    Returns:
        Positions in `SPLITS`.

    Raises:
        ValueError: if a data set is missing, or a split that the run reads has too little data.
    """
    if args.mock_data:
        return []

    def empty_or_error() -> list[int] | str:
        # Rank 0 reads data on every layout.
        if dist.get_rank() != 0:
            return []
        try:
            splits = _splits(args, blend, blend_per_split, num_samples)
            return [split.index for split in splits if _is_empty(split, args)]
        except ValueError as error:
            return str(error)

    result: list[int] | str = gather_objects(together(empty_or_error))[0]
    if isinstance(result, str):
        raise ValueError(result)
    return result


def _splits(
    args: Namespace,
    blend: Blend,
    blend_per_split: Sequence[Blend] | None,
    num_samples: Sequence[int | None],
) -> list[_Split]:
    if blend is None and blend_per_split is None:
        raise input_error(
            "No training data was given. Use --data-path, --train-data-path and --valid-data-path, "
            "or --mock-data."
        )
    evaluates = args.full_validation or args.eval_iters > 0
    is_read = (bool(num_samples[0]), evaluates, evaluates)
    bounds: list[Bounds] = [(0.0, 1.0)] * len(SPLITS)
    blends = blend_per_split or [blend] * len(SPLITS)
    if blend is not None:
        bounds = split_bounds(args.split or DEFAULT_SPLIT)
    return [
        _Split(index, bounds[index], blends[index], num_samples[index], is_read[index])
        for index in range(len(SPLITS))
    ]


def _is_empty(split: _Split, args: Namespace) -> bool:
    """Whether a data set has no tokens for a split that the run does not read.

    Raises:
        ValueError: if it has none, or too few, for a split that the run reads.
    """
    name = SPLITS[split.index]
    if split.is_absent:
        # Megatron evaluates on the test split only if there is one.
        if split.is_read and name != "test":
            raise input_error(_absent(split, args))
        return False
    assert split.blend is not None
    paths, weights = split.blend
    repeats = split.samples is not None and (weights is not None or len(paths) == 1)
    available = 0
    for path in paths:
        if is_object_storage_path(path) or args.dataloader_fast_cache_load:
            return False  # only Megatron reads these
        data_set = _opened(path)
        # They are mapped memory of the data set, which must stay open.
        lengths = np.zeros(0, np.int32) if data_set is None else data_set.sequence_lengths
        first, last = documents_in(split.bounds, len(lengths))
        if not lengths[first:last].any():
            if not split.is_read:
                return True
            raise input_error(_without_tokens(split, args, path, len(lengths), last - first))
        if not repeats:
            # A sample needs one token more than its length, for the last label.
            samples = (int(lengths[first:last].sum(dtype=np.int64)) - 1) // args.seq_length
            if samples == 0 and not split.is_read:
                return True
            if samples == 0:
                raise input_error(
                    f"The {name} split of {path} has fewer than {args.seq_length + 1} tokens, "
                    f"those of one sample of --seq-length {args.seq_length}. Use more data, or "
                    "lower --seq-length."
                )
            available += samples
    needed = split.samples
    if args.dataloader_type == "cyclic":
        needed = args.micro_batch_size * args.data_parallel_size
    if split.is_read and not repeats and needed is not None and available < needed:
        raise input_error(
            f"The data sets of the {name} split have {available} samples of {args.seq_length} "
            f"tokens, but the run reads {needed}. Data sets without weights are read only once: "
            "give each path a weight before it, for instance --data-path 0.5 a 0.5 b, or train on "
            "fewer samples."
        )
    return False


def _opened(path: str) -> IndexedDataset | None:
    """The data set, or None if it has no tokens: Megatron cannot open it then."""
    if not IndexedDataset.exists(path):
        raise input_error(
            f"The data set {path} does not exist: {path}.bin and {path}.idx must both be there. "
            "Give the path without suffix, as tools/preprocess_data.py prints it."
        )
    if os.path.getsize(f"{path}.bin") == 0:
        return None
    try:
        return IndexedDataset(path)
    except (AssertionError, OSError, ValueError) as broken:
        raise input_error(
            f"{path}.idx cannot be read as an index of Megatron: {type(broken).__name__}: "
            f"{broken}. Write it again with tools/preprocess_data.py."
        ) from broken


def _use_of(split: _Split, args: Namespace) -> str:
    if SPLITS[split.index] == "training":
        return "the run trains on it"
    if args.full_validation:
        return "--full-validation evaluates on it"
    return f"--eval-iters {args.eval_iters} evaluates on it"


def _absent(split: _Split, args: Namespace) -> str:
    name = SPLITS[split.index]
    if split.blend is None:
        cause = "has no data path"
        remedy = f"Set --{'train' if name == 'training' else 'valid'}-data-path"
    else:
        cause = f"is empty with --split {args.split}"
        remedy = f"Give it a share of the data, for instance {_working_split(split.index)}"
    if name != "training":
        remedy += ", or set --eval-iters 0"
    return f"The {name} split {cause}, but {_use_of(split, args)}. {remedy}."


def _working_split(index: int) -> str:
    return "--split 99,1,0" if index < 2 else "--split 98,1,1"


def _without_tokens(
    split: _Split, args: Namespace, path: str, documents: int, in_split: int
) -> str:
    name = SPLITS[split.index]
    count = f"{documents} document{'' if documents == 1 else 's'}"
    if in_split:
        cause = f"its {in_split} documents have no tokens"
    elif documents == 0 or split.bounds == (0.0, 1.0):
        cause = f"the data set has {count if documents else 'no tokens'}"
    else:
        cause = f"--split {args.split} gives it none of the {count}"
    remedies = [
        "use more documents (tools/preprocess_data.py --documents paragraph makes many of one file)"
    ]
    if split.bounds != (0.0, 1.0):
        remedies.append("change --split")
    if name != "training":
        remedies.append("set --eval-iters 0")
    return (
        f"The {name} split of {path} is empty, but {_use_of(split, args)}: {cause}. To fix this, "
        f"{', or '.join(remedies)}."
    )
