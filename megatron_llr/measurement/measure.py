"""`SpectrumEngine.measure()`: spectrum records of all matrices, identical on every rank."""

import contextlib
import logging
import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass, fields, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from megatron_llr.config import LLRConfig
from megatron_llr.errors import first_line, topology_error
from megatron_llr.matrices.ids import EMBEDDING_IDS, MatrixId
from megatron_llr.matrices.info import MatrixIndex
from megatron_llr.matrices.shard import MatrixShard
from megatron_llr.measurement.batch_queue import BatchQueue, QueuedMatrix
from megatron_llr.measurement.master_weights import MasterCopies, MasterWeights
from megatron_llr.measurement.owners import assign_owners
from megatron_llr.measurement.transfers import (
    all_gather_in_batches,
    all_gather_rows,
    pool_singular_values,
    read_shard,
    send_to_owners,
    transfer_batches,
)
from megatron_llr.ranks import exchange, raise_together
from megatron_llr.spectrum import batched, records_from_eigenvalues
from megatron_llr.spectrum.batched import Spectrum
from megatron_llr.spectrum.eigenvalues import eigenvalues_of
from megatron_llr.spectrum.farms import farms_eigenvalues
from megatron_llr.spectrum.record import SpectrumRecord, SpectrumTable

logger = logging.getLogger(__name__)

_METHODS = ("failed", "gram32", "gram64", "svd64", "pooled", "farms")
_WIDTH = len(fields(SpectrumRecord))

ReadMatrix = Callable[[], torch.Tensor]
"""Returns the weights of a matrix; may run out of memory."""


@dataclass(frozen=True)
class Measurement:
    """Result of one measurement.

    Attributes:
        table: record of every measured matrix, in matrix_index order.
        spectra: singular values of every measured matrix, [N] fp64 ascending, on CPU; empty on
            ranks that are not in `SpectrumEngine.readers`.
        seconds: wall time on this rank.
    """

    table: SpectrumTable
    spectra: dict[MatrixId, torch.Tensor]
    seconds: float


def _record_of_row(row: Sequence[float], estimator: str) -> SpectrumRecord:
    """The record of a row that `_share_records` sends."""
    values: dict[str, Any] = dict(
        zip((field.name for field in fields(SpectrumRecord)), row, strict=True)
    )
    for name in ("ks", "fix_finger"):
        if name != estimator:
            values[f"alpha_{name}"] = None
    values["num_eigenvalues"] = int(values["num_eigenvalues"])
    values["method"] = _METHODS[int(values["method"])]
    return SpectrumRecord(**values)


class SpectrumEngine:
    """Measures all tunable matrices of a job.

    Args:
        shards: catalog of this rank.
        matrix_index: all matrices of the job.
        config: reads `spectrum`, `estimator`, `embedding`, `measure_memory`, `farms_rows` and
            `farms_windows`.
        masters: fp32 copies to measure instead of the model's weights.
    """

    def __init__(
        self,
        shards: Sequence[MatrixShard],
        matrix_index: MatrixIndex,
        config: LLRConfig,
        masters: MasterCopies | None = None,
    ) -> None:
        self._config = config
        measured = [
            info
            for matrix, info in matrix_index.items()
            if info.tunable and (matrix not in EMBEDDING_IDS or config.embedding == "measured")
        ]
        self.owners = assign_owners(measured)
        """Matrix id -> global rank that computes its spectrum, in matrix_index order."""
        self.readers: Collection[int] = range(dist.get_world_size())
        """Global ranks that receive the singular values, initially all; the same on every rank."""
        self._owned_by_rank: list[list[MatrixId]] = [[] for _ in range(dist.get_world_size())]
        for matrix, owner in self.owners.items():
            self._owned_by_rank[owner].append(matrix)
        mine = set(self._owned_by_rank[dist.get_rank()])
        self._owned_of_size = Counter(
            info.num_eigenvalues for info in measured if info.matrix in mine
        )
        here = {
            shard.matrix: shard
            for shard in shards
            if shard.matrix in self.owners and not shard.copy
        }
        by_group: dict[tuple[int, ...], list[MatrixShard]] = defaultdict(list)
        for matrix, owner in self.owners.items():
            shard = here.get(matrix)
            if shard is not None and owner in shard.ranks:
                by_group[shard.ranks].append(shard)
        self._by_group = dict(sorted(by_group.items()))
        self._masters = (
            None if masters is None else MasterWeights(masters, shards, matrix_index, self.owners)
        )
        self._error: Exception | None = None
        self._device = shards[0].parameter.device if shards else torch.device("cpu")

    def measure(self) -> Measurement:
        """Compute every spectrum once and share the results. Enter on all ranks.

        Raises:
            RuntimeError: on every rank if any rank ran out of memory or lost its device; on the
                remaining ranks if a rank died.
        """
        here = dist.get_rank()
        started = time.perf_counter()
        self._error = None
        owned: dict[MatrixId, Spectrum] = {}
        queue = BatchQueue(1e9 * self._config.measure_memory)
        with exchange("a measurement"):
            for shards in self._measured_shards():
                # Matrices that this rank owns and holds whole are not sent.
                whole = (
                    (shard, partial(read_shard, shard))
                    for shard in shards
                    if not shard.split and self.owners[shard.matrix] == here
                )
                owned.update(self._solved(whole, queue))
                split = [shard for shard in shards if shard.split]
                if split and self._config.spectrum != "sharded":
                    owned.update(self._solved(self._assembled(split), queue))
                elif split:
                    owned.update(self._pooled(split))
        for batch in queue.drain():
            owned.update(self._solve_batch(batch))
        records = self._records(owned)
        raise_together(self._error)
        with exchange("a measurement"):
            table = self._share_records(records)
            shared = self._share_singular_values(owned, table)
        return Measurement(table, shared, time.perf_counter() - started)

    def _measured_shards(self) -> Iterator[list[MatrixShard]]:
        """Shards of every group, with fp32 copies as parameters if those are measured."""
        if self._masters is None:
            yield from self._by_group.values()
            return
        weights = self._masters.collect()
        for shards in self._by_group.values():
            yield [
                replace(shard, parameter=torch.nn.Parameter(weights[id(shard.parameter)]))
                for shard in shards
            ]

    def _assembled(self, split: Sequence[MatrixShard]) -> Iterator[tuple[MatrixShard, ReadMatrix]]:
        """The split matrices that this rank owns. Every rank sends its shards to the owners."""
        for batch in transfer_batches(split, self.owners):
            whole = send_to_owners(batch, self.owners)
            for shard in batch:
                if shard.matrix in whole:
                    # Drops the reference here, so the matrix is freed with its batch.
                    yield shard, partial(whole.pop, shard.matrix)

    def _solved(
        self, matrices: Iterable[tuple[MatrixShard, ReadMatrix]], queue: BatchQueue
    ) -> Iterator[tuple[MatrixId, Spectrum]]:
        """Spectra of matrices one by one, or of a batch as soon as it is full."""
        memory = 1e9 * self._config.measure_memory
        for shard, read in matrices:
            size = min(shard.rows, shard.columns)
            dtype = batched.gram_dtype(size, full=self._full)
            limit = 1
            # With farms, the submatrices of a single matrix are a batch.
            if self._config.spectrum != "farms":
                count = self._owned_of_size[size]
                limit = batched.batch_size(size, count, dtype, memory, self._device.type)
            if limit == 1:
                yield shard.matrix, self._eigenvalues(shard, read)
                continue
            weight = None
            with self._deferred_error(shard.matrix):
                weight = read()
            if weight is None:
                yield shard.matrix, self._no_values(size)
                continue
            queued = QueuedMatrix(shard, weight, batched.memory_of(size, dtype))
            for batch in queue.add(size, queued, limit):
                yield from self._solve_batch(batch)

    def _solve_batch(self, batch: Sequence[QueuedMatrix]) -> list[tuple[MatrixId, Spectrum]]:
        """Spectra of matrices of equal smaller side. NaN after an error: collectives follow."""
        names = [queued.shard.matrix for queued in batch]

        def solve_one(index: int) -> Spectrum:
            return self._eigenvalues(batch[index].shard, lambda: batch[index].weight)

        names_text = names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"
        with self._deferred_error(names_text):
            spectra = batched.eigenvalues_in_batches(
                [queued.weight for queued in batch],
                full=self._full,
                memory=1e9 * self._config.measure_memory,
                names=names,
                solve_one=solve_one,
            )
            return list(zip(names, spectra, strict=True))
        return [
            (name, self._no_values(min(queued.weight.shape)))
            for name, queued in zip(names, batch, strict=True)
        ]

    def _no_values(self, count: int) -> Spectrum:
        return torch.full((count,), math.nan, dtype=torch.float64, device=self._device), "failed"

    @property
    def _full(self) -> bool:
        """Whether the small eigenvalues are needed too."""
        return self._config.estimator != "hill_median"

    def _pooled(self, split: Sequence[MatrixShard]) -> Iterator[tuple[MatrixId, Spectrum]]:
        """Pooled spectra of the shards. Singular values are sent, but no weights."""
        here = dist.get_rank()
        local = [self._eigenvalues(shard, partial(read_shard, shard))[0].sqrt() for shard in split]
        for shard, pooled in zip(split, pool_singular_values(local, split), strict=True):
            if self.owners[shard.matrix] == here:
                yield shard.matrix, (pooled.square(), "pooled")

    def _eigenvalues(self, shard: MatrixShard, read: ReadMatrix) -> Spectrum:
        """Eigenvalues of the weights from `read`. NaN after an error: collectives follow."""
        config = self._config
        count = min(shard.placement.rows, shard.placement.columns)
        with self._deferred_error(shard.matrix):
            weight = read()
            count = min(weight.shape)
            if count > 0:
                if config.spectrum == "farms":
                    size, memory = (config.farms_rows, config.farms_windows), config.measure_memory
                    spectrum = farms_eigenvalues(
                        weight, *size, full=self._full, memory=1e9 * memory
                    )
                else:
                    spectrum = eigenvalues_of(weight, full=self._full)
                if spectrum[1] == "failed":
                    logger.warning("megatron_llr: no eigenvalues of %s", shard.matrix)
                return spectrum
        return self._no_values(count)

    @contextlib.contextmanager
    def _deferred_error(self, matrix: str) -> Iterator[None]:
        """Store an error (out of memory, a lost device) until all ranks raise it together."""
        try:
            yield
        except Exception as caught:
            self._error = self._error or topology_error(
                f"the spectrum of {matrix} cannot be computed",
                got=f"{type(caught).__name__}: {first_line(caught)}",
                allowed="memory for the matrix and its Gram matrix, in fp32 or fp64, on its owner",
                remedy="lower --micro-batch-size or set --llr-spectrum sharded if memory ran out",
            )

    def _records(self, owned: dict[MatrixId, Spectrum]) -> dict[MatrixId, SpectrumRecord]:
        """Records of spectra. Those of one length are computed together and copied once."""
        by_length: dict[int, list[MatrixId]] = defaultdict(list)
        for matrix, (eigenvalues, _) in owned.items():
            by_length[eigenvalues.numel()].append(matrix)
        records: dict[MatrixId, SpectrumRecord] = {}
        for matrices in by_length.values():
            with self._deferred_error(matrices[0]):
                fitted = records_from_eigenvalues(
                    [owned[matrix][0] for matrix in matrices],
                    estimators=(self._config.estimator,),
                    methods=[owned[matrix][1] for matrix in matrices],
                )
                records.update(zip(matrices, fitted, strict=True))
        return records

    def _share_records(self, records: dict[MatrixId, SpectrumRecord]) -> SpectrumTable:
        """Records of all matrices on every rank, in one all-gather of one fp64 row per record."""
        owned = self._owned_by_rank
        mine = []
        for matrix in owned[dist.get_rank()]:
            values = list(astuple(records[matrix]))
            values[-1] = _METHODS.index(records[matrix].method)
            mine.append([math.nan if value is None else float(value) for value in values])
        rows = torch.tensor(mine, dtype=torch.float64, device=self._device).view(-1, _WIDTH)
        shared = all_gather_rows(rows, [len(matrices) for matrices in owned])
        table = {
            matrix: _record_of_row(row, self._config.estimator)
            for matrices, part in zip(owned, shared, strict=True)
            for matrix, row in zip(matrices, part.tolist(), strict=True)
        }
        return {matrix: table[matrix] for matrix in self.owners}

    def _share_singular_values(
        self, spectra: dict[MatrixId, Spectrum], table: SpectrumTable
    ) -> dict[MatrixId, torch.Tensor]:
        """Singular values of all matrices on the readers. Nothing is sent if there are none."""
        if not self.readers:
            return {}
        owned = self._owned_by_rank
        sizes = [[table[matrix].num_eigenvalues for matrix in part] for part in owned]
        mine = [spectra[matrix][0].sqrt() for matrix in owned[dist.get_rank()]]
        shared: dict[MatrixId, torch.Tensor] = {}
        for rank, vectors, values in all_gather_in_batches(mine, sizes, self._device):
            if dist.get_rank() in self.readers:
                parts = values.cpu().split(sizes[rank][vectors])
                shared.update(zip(owned[rank][vectors], parts, strict=True))
        return {matrix: shared[matrix] for matrix in self.owners if matrix in shared}
