"""The collectives of a measurement: shards to owners, singular values and records to all ranks.

Every rank derives the same lists from the same index, so all ranks of a group enter the collectives
in the same order.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from megatron_llr.matrices.ids import MatrixId
from megatron_llr.matrices.layout import Placement
from megatron_llr.matrices.shard import MatrixShard

# Upper bound on the bytes that a rank receives at once. A single matrix may exceed it.
BATCH_BYTES = 256 * 2**20


def read_weight(shard: MatrixShard) -> torch.Tensor:
    """The parameter of a shard, [local rows, local columns], dequantized; otherwise not copied."""
    parameter = shard.parameter.detach()
    # Quantized parameters of Transformer Engine have this method.
    dequantize = getattr(parameter, "dequantize", None)
    is_quantized = type(parameter) not in (torch.Tensor, torch.nn.Parameter)
    return dequantize() if is_quantized and dequantize else parameter


def read_shard(shard: MatrixShard) -> torch.Tensor:
    """The part of the logical matrix on this rank, [local rows, local columns]."""
    weight = read_weight(shard)
    runs = [weight[span.local : span.local + span.count] for span in shard.placement.spans]
    if len(runs) == 1:
        return runs[0]
    return torch.cat(runs) if runs else weight[:0]


def assemble_matrix(
    shards: Sequence[torch.Tensor], placements: Sequence[Placement], rows: int, columns: int
) -> torch.Tensor:
    """The logical matrix from the shards of all ranks.

    Args:
        shards: one flat tensor per rank, with the rows of that rank in order.
        placements: the rows and columns of each shard.
        rows: rows of the matrix.
        columns: columns of the matrix.
    """
    whole = shards[0].new_empty(rows, columns)
    for shard, placement in zip(shards, placements, strict=True):
        held = shard.view(placement.rows, placement.columns)
        first, last = placement.first_column, placement.first_column + placement.columns
        row = 0
        for span in placement.spans:
            target = slice(span.logical, span.logical + span.count)
            whole[target, first:last] = held[row : row + span.count]
            row += span.count
    return whole


def transfer_batches(
    shards: Sequence[MatrixShard], owners: Mapping[MatrixId, int], limit: int = BATCH_BYTES
) -> Iterator[list[MatrixShard]]:
    """Divide a list of matrices so that no owner receives more than `limit` bytes at once."""
    batch: list[MatrixShard] = []
    received: dict[int, int] = {}
    for shard in shards:
        owner = owners[shard.matrix]
        size = shard.rows * shard.columns * shard.parameter.element_size()
        if batch and received.get(owner, 0) + size > limit:
            yield batch
            batch, received = [], {}
        batch.append(shard)
        received[owner] = received.get(owner, 0) + size
    if batch:
        yield batch


def send_to_owners(
    batch: Sequence[MatrixShard], owners: Mapping[MatrixId, int]
) -> dict[MatrixId, torch.Tensor]:
    """Whole matrices on their owners, from the shards of one tensor-parallel group.

    One all-to-all. Weights are sent in their own dtype, as bytes. Enter on all ranks of the group
    with the same batch.

    Returns:
        Matrix id -> [rows, columns], for the matrices that this rank owns.
    """
    ranks, group = batch[0].ranks, batch[0].group
    here = dist.get_rank()
    empty = torch.empty(0, dtype=torch.uint8, device=batch[0].parameter.device)
    by_owner: dict[int, list[MatrixShard]] = {rank: [] for rank in ranks}
    for shard in batch:
        by_owner[owners[shard.matrix]].append(shard)
    # Read once per matrix, since each read of a quantized weight dequantizes it.
    local = {shard.matrix: read_shard(shard) for shard in batch}
    dtypes = {matrix: part.dtype for matrix, part in local.items()}
    outgoing = [
        torch.cat([empty, *(local[s.matrix].reshape(-1).view(torch.uint8) for s in by_owner[rank])])
        for rank in ranks
    ]
    incoming_sizes = [
        sum(
            shard.placements[peer].numel * dtypes[shard.matrix].itemsize for shard in by_owner[here]
        )
        for peer in range(len(ranks))
    ]
    received = empty.new_empty(sum(incoming_sizes))
    dist.all_to_all_single(
        received,
        torch.cat(outgoing),
        output_split_sizes=incoming_sizes,
        input_split_sizes=[part.numel() for part in outgoing],
        group=group,
    )
    return _assemble_received(by_owner[here], dtypes, list(received.split(incoming_sizes)))


def _assemble_received(
    owned: Sequence[MatrixShard],
    dtypes: Mapping[MatrixId, torch.dtype],
    by_peer: Sequence[torch.Tensor],
) -> dict[MatrixId, torch.Tensor]:
    offsets = [0] * len(by_peer)
    whole: dict[MatrixId, torch.Tensor] = {}
    for shard in owned:
        dtype = dtypes[shard.matrix]
        shards = []
        for peer, placement in enumerate(shard.placements):
            size = placement.numel * dtype.itemsize
            raw = by_peer[peer][offsets[peer] : offsets[peer] + size]
            # A view as a wider dtype needs an aligned start, which a slice may not have.
            shards.append(raw.clone().view(dtype))
            offsets[peer] += size
        whole[shard.matrix] = assemble_matrix(shards, shard.placements, shard.rows, shard.columns)
    return whole


def pool_singular_values(
    values: Sequence[torch.Tensor], shards: Sequence[MatrixShard]
) -> list[torch.Tensor]:
    """All-gather the singular values of every rank's shard and pool them for each matrix.

    One all-gather over the tensor-parallel group. Enter on all its ranks with the same matrices.

    Args:
        values: [n_i] singular values of this rank's shard of every matrix.
        shards: those matrices.

    Returns:
        [sum over ranks of n_i] pooled singular values of every matrix, ascending.
    """
    ranks, group = shards[0].ranks, shards[0].group
    counts = [
        [min(placement.rows, placement.columns) for placement in shard.placements]
        for shard in shards
    ]
    totals = [sum(count[peer] for count in counts) for peer in range(len(ranks))]
    gathered = all_gather_rows(torch.cat(list(values)).unsqueeze(1), totals, group)
    split = [
        part.squeeze(1).split([count[peer] for count in counts])
        for peer, part in enumerate(gathered)
    ]
    return [
        torch.cat([parts[index] for parts in split]).sort().values for index in range(len(shards))
    ]


def all_gather_in_batches(
    mine: Sequence[torch.Tensor],
    sizes: Sequence[Sequence[int]],
    device: torch.device,
    limit: int = BATCH_BYTES,
) -> Iterator[tuple[int, slice, torch.Tensor]]:
    """Every rank's vectors on every rank of the job, a bounded number of bytes at a time.

    One all-gather per batch, padded to the longest part in it. Enter on all ranks, and exhaust the
    iterator.

    Args:
        mine: fp64 vectors of this rank.
        sizes: sizes of the vectors of every rank, in rank order; the same on every rank.
        device: of the vectors, if this rank has none.
        limit: bytes of a batch over all ranks. One vector per rank may exceed it.

    Yields:
        (rank, slice of its vectors, these vectors concatenated), in the same order on every rank.
    """
    here, starts = dist.get_rank(), [0] * len(sizes)
    empty = torch.empty(0, dtype=torch.float64, device=device)
    while any(first < len(own) for first, own in zip(starts, sizes, strict=True)):
        stops = []
        for first, own in zip(starts, sizes, strict=True):
            # At least one vector of every rank, and as many as are within the limit.
            stop, total = first, 0
            while stop < len(own) and (
                stop == first or total + own[stop] <= limit // (8 * len(sizes))
            ):
                total += own[stop]
                stop += 1
            stops.append(stop)
        taken = [own[a:b] for own, a, b in zip(sizes, starts, stops, strict=True)]
        rows = torch.cat([empty, *mine[starts[here] : stops[here]]]).unsqueeze(1)
        for rank, part in enumerate(all_gather_rows(rows, [sum(each) for each in taken])):
            yield rank, slice(starts[rank], stops[rank]), part.squeeze(1)
        starts = stops


def all_gather_rows(
    rows: torch.Tensor, counts: Sequence[int], group: Any = None
) -> list[torch.Tensor]:
    """Every rank's rows on every rank of a group, by default of the job.

    Args:
        rows: [counts[this rank], width].
        counts: number of rows of each rank, in rank order; the same on every rank.
        group: process group, entered by all its ranks.
    """
    padded = rows.new_zeros(max(max(counts), 1), rows.shape[1])
    padded[: rows.shape[0]] = rows
    gathered = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(gathered, padded, group=group)
    return [part[:count] for part, count in zip(gathered, counts, strict=True)]
