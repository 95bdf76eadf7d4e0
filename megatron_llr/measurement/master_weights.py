"""fp32 weights for the measurement, collected from the optimizer's fp32 copies.

The distributed optimizer divides every parameter's fp32 copy over the data-parallel replicas. The
slices of a parameter are sent only to the replicas whose ranks own a matrix in it, so the fp32
weights that a rank receives are about as many as the slices that it holds.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_llr.config import flag
from megatron_llr.errors import input_error
from megatron_llr.matrices.ids import MatrixId
from megatron_llr.matrices.info import MatrixIndex
from megatron_llr.matrices.shard import MatrixShard
from megatron_llr.ranks import raise_together


@dataclass(frozen=True, eq=False)
class MasterSlice:
    """A slice of a parameter's fp32 copy on this rank.

    Attributes:
        parameter: the model parameter.
        tensor: the slice, fp32.
        start: its first element, in the flattened parameter.
        group: process group that the parameter is divided over; None if the slice is the whole.
    """

    parameter: torch.nn.Parameter
    tensor: torch.Tensor
    start: int
    group: Any


@dataclass(frozen=True)
class MasterCopies:
    """All slices on this rank, and all groups that parameters are divided over.

    A rank may hold no slice in a group. The order of groups is the same on all their ranks.
    """

    slices: tuple[MasterSlice, ...]
    groups: tuple[Any, ...]


class MasterWeights:
    """Collects the fp32 weights of the matrices that this rank's replica owns.

    Args:
        copies: fp32 copies on this rank.
        shards: catalog of this rank: the matrices in each parameter, and its name.
        matrix_index: all matrices of the job.
        owners: matrix id -> global rank that measures it.

    Raises:
        ValueError: if neither this rank nor its group holds the fp32 copy of a parameter.
    """

    def __init__(
        self,
        copies: MasterCopies,
        shards: Sequence[MatrixShard],
        matrix_index: MatrixIndex,
        owners: Mapping[MatrixId, int],
    ) -> None:
        self._matrices: dict[int, list[MatrixShard]] = defaultdict(list)
        for shard in shards:
            if shard.matrix in owners and not shard.copy:
                self._matrices[id(shard.parameter)].append(shard)
        self._parameters = {id(shard.parameter): shard.parameter for shard in shards}
        self._names = {id(shard.parameter): shard.parameter_id for shard in shards}
        self._matrix_index, self._owners = matrix_index, owners
        self._groups = {id(group): group for group in copies.groups}
        self._whole: list[MasterSlice] = []
        self._by_group: dict[int, list[MasterSlice]] = defaultdict(list)
        for held in copies.slices:
            if id(held.parameter) in self._matrices:
                is_divided = held.group is not None
                (self._by_group[id(held.group)] if is_divided else self._whole).append(held)
        # For every group and rank: name of a parameter -> range of its slice.
        self._ranges: dict[int, list[dict[MatrixId, tuple[int, int]]]] = {}
        for key, group in self._groups.items():
            mine = {
                self._names[id(held.parameter)]: (held.start, held.start + held.tensor.numel())
                for held in self._by_group[key]
            }
            gathered: list[Any] = [None] * dist.get_world_size(group)
            dist.all_gather_object(gathered, mine, group=group)
            self._ranges[key] = gathered
        raise_together(self._missing_copy())
        self._wanted = self._wanted_by_rank()

    def _missing_copy(self) -> ValueError | None:
        known = {self._names[id(held.parameter)] for held in self._whole}
        known.update(name for ranks in self._ranges.values() for held in ranks for name in held)
        unknown = sorted({self._names[key] for key in self._matrices} - known)
        if not unknown:
            return None
        source = flag("spectrum_source")
        return input_error(
            f"{source} master needs the fp32 copy of {unknown[0]}, which neither this rank nor its "
            "data-parallel group holds: the optimizer assigns whole parameters to replicas. Use an "
            "optimizer that steps every parameter on each replica or divides it over them: set "
            f"{source} model or remove --use-distributed-optimizer"
        )

    def _wanted_by_rank(self) -> dict[int, set[str]]:
        """Names of the parameters that the replica of every rank needs. They never change."""
        replicas: dict[int, dict[int, list[int]]] = {}
        wanted: dict[int, set[str]] = defaultdict(set)
        for key, shards in self._matrices.items():
            for shard in shards:
                holders = self._matrix_index[shard.matrix].holders
                if id(holders) not in replicas:
                    # Rank -> the ranks of all groups that it is in.
                    replica = replicas[id(holders)] = defaultdict(list)
                    for group in holders:
                        for rank in group:
                            replica[rank].extend(group)
                for rank in replicas[id(holders)][self._owners[shard.matrix]]:
                    wanted[rank].add(self._names[key])
        return wanted

    def collect(self) -> dict[int, torch.Tensor]:
        """fp32 weights by id of the parameter, [local rows, local columns].

        One all-to-all per group of the distributed optimizer. Enter on all ranks.
        """
        weights = {
            id(held.parameter): held.tensor.detach().view(held.parameter.shape)
            for held in self._whole
        }
        by_name = {self._names[key]: key for key in self._matrices}
        for key, group in self._groups.items():
            for name, flat in self._exchange(key, group).items():
                weights[by_name[name]] = flat.view(self._parameters[by_name[name]].shape)
        return weights

    def _exchange(self, key: int, group: Any) -> dict[MatrixId, torch.Tensor]:
        """Flattened fp32 weights by name, of the parameters in a group that this rank needs."""
        ranks = dist.get_process_group_ranks(group)
        held = {self._names[id(p.parameter)]: p.tensor.detach() for p in self._by_group[key]}
        empty = next(iter(self._parameters.values())).new_empty(0, dtype=torch.float32)
        outgoing = [
            [tensor.view(-1) for name, tensor in sorted(held.items()) if name in self._wanted[rank]]
            for rank in ranks
        ]
        wanted_here = self._wanted[dist.get_rank()]
        incoming = [
            [(name, *ends) for name, ends in sorted(ranges.items()) if name in wanted_here]
            for ranges in self._ranges[key]
        ]
        sizes = [sum(stop - start for _, start, stop in peer) for peer in incoming]
        received = empty.new_empty(sum(sizes))
        dist.all_to_all_single(
            received,
            torch.cat([empty, *(tensor for tensors in outgoing for tensor in tensors)]),
            output_split_sizes=sizes,
            input_split_sizes=[sum(tensor.numel() for tensor in tensors) for tensors in outgoing],
            group=group,
        )
        numel = {self._names[key]: p.numel() for key, p in self._parameters.items()}
        whole: dict[MatrixId, torch.Tensor] = {}
        targets, sources = [], []
        for peer, part in zip(incoming, received.split(sizes), strict=True):
            offset = 0
            for name, start, stop in peer:
                target = whole.setdefault(name, empty.new_empty(numel[name]))
                targets.append(target[start:stop])
                sources.append(part[offset : offset + stop - start])
                offset += stop - start
        if targets:
            # A few launches on CUDA for any number of slices.
            torch._foreach_copy_(targets, sources)
        return whole
