"""fp32 weights for the measurement, from the optimizer's masters, wherever their slices lie.

The distributed optimizer cuts every parameter's fp32 copy over the data-parallel replicas. The
slices of a parameter travel to that replica alone whose ranks own a matrix in it, so that a rank
holds no more fp32 weights than its share of the masters, about.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_llr.config import flag
from megatron_llr.errors import user_error
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
        group: process group over which the parameter is cut; None if the slice is the whole.
    """

    parameter: torch.nn.Parameter
    tensor: torch.Tensor
    start: int
    group: Any


@dataclass(frozen=True)
class MasterCopies:
    """All slices on this rank, and the groups that cut parameters, whether it holds a slice or not.

    Groups come in the same order on all their ranks.
    """

    slices: tuple[MasterSlice, ...]
    groups: tuple[Any, ...]


def _replica_of_rank(holders: tuple[tuple[int, ...], ...]) -> dict[int, list[int]]:
    """Rank -> the ranks of all groups that it is in."""
    found: dict[int, list[int]] = defaultdict(list)
    for group in holders:
        for rank in group:
            found[rank].extend(group)
    return found


class MasterWeights:
    """Collects the fp32 weights that the matrices owned by this rank's replica need.

    Args:
        copies: of this rank.
        shards: catalog of this rank; says which matrices lie in a parameter, and its name.
        matrix_index: all matrices of the job.
        owners: matrix id -> global rank that measures it.

    Raises:
        ValueError: if a parameter's fp32 copy lies where this rank cannot get it.
    """

    def __init__(
        self,
        copies: MasterCopies,
        shards: Sequence[MatrixShard],
        matrix_index: MatrixIndex,
        owners: Mapping[str, int],
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
        for piece in copies.slices:
            if id(piece.parameter) in self._matrices:
                cut = piece.group is not None
                (self._by_group[id(piece.group)] if cut else self._whole).append(piece)
        self._ranges = {key: self._gather_ranges(key) for key in self._groups}
        raise_together(self._missing())
        # What the replica of a rank needs never changes.
        self._wanted = self._wanted_by_rank()

    def _missing(self) -> ValueError | None:
        known = {self._names[id(piece.parameter)] for piece in self._whole}
        known.update(name for ranks in self._ranges.values() for held in ranks for name in held)
        unknown = sorted({self._names[key] for key in self._matrices} - known)
        if not unknown:
            return None
        return user_error(
            f"{flag('spectrum_source')} master needs fp32 copies that this rank or its group holds",
            got=f"an optimizer that deals whole parameters to replicas: {unknown[0]} is elsewhere",
            allowed="an optimizer that steps every parameter on each replica, or cuts it over them",
            remedy=f"{flag('spectrum_source')} model, or leave --use-distributed-optimizer out",
        )

    def _gather_ranges(self, key: int) -> list[dict[str, tuple[int, int]]]:
        """What every rank of a group holds: name of the parameter -> its range."""
        mine = {
            self._names[id(piece.parameter)]: (piece.start, piece.start + piece.tensor.numel())
            for piece in self._by_group[key]
        }
        group = self._groups[key]
        found: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(found, mine, group=group)
        return found

    def _wanted_by_rank(self) -> dict[int, set[str]]:
        """Names of the parameters that the replica of every rank needs."""
        replicas: dict[int, dict[int, list[int]]] = {}
        wanted: dict[int, set[str]] = defaultdict(set)
        for key, shards in self._matrices.items():
            for shard in shards:
                holders = self._matrix_index[shard.matrix].holders
                if id(holders) not in replicas:
                    replicas[id(holders)] = _replica_of_rank(holders)
                for rank in replicas[id(holders)][self._owners[shard.matrix]]:
                    wanted[rank].add(self._names[key])
        return wanted

    def collect(self) -> dict[int, torch.Tensor]:
        """Id of a parameter -> its fp32 weights, [local rows, local columns].

        One all-to-all per group of the distributed optimizer. Enter on all ranks.
        """
        found = {
            id(piece.parameter): piece.tensor.detach().view(piece.parameter.shape)
            for piece in self._whole
        }
        by_name = {self._names[key]: key for key in self._matrices}
        for key, group in self._groups.items():
            for name, flat in self._exchange(key, group).items():
                found[by_name[name]] = flat.view(self._parameters[by_name[name]].shape)
        return found

    def _exchange(self, key: int, group: Any) -> dict[str, torch.Tensor]:
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
            torch.cat([empty, *(piece for pieces in outgoing for piece in pieces)]),
            output_split_sizes=sizes,
            input_split_sizes=[sum(piece.numel() for piece in pieces) for pieces in outgoing],
            group=group,
        )
        numel = {self._names[key]: p.numel() for key, p in self._parameters.items()}
        whole: dict[str, torch.Tensor] = {}
        targets, sources = [], []
        for peer, part in zip(incoming, received.split(sizes), strict=True):
            offset = 0
            for name, start, stop in peer:
                target = whole.setdefault(name, empty.new_empty(numel[name]))
                targets.append(target[start:stop])
                sources.append(part[offset : offset + stop - start])
                offset += stop - start
        if targets:
            # A few launches on CUDA, however many slices there are.
            torch._foreach_copy_(targets, sources)
        return whole
