"""`SpectrumEngine.measure()`: the spectrum record of every matrix, identical on every rank."""

import contextlib
import logging
import math
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import astuple, dataclass, fields, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from megatron_llr.config import LLRConfig
from megatron_llr.errors import first_line, topology_error
from megatron_llr.matrices.ids import EMBEDDING_IDS
from megatron_llr.matrices.info import MatrixIndex
from megatron_llr.matrices.shard import MatrixShard
from megatron_llr.measurement.exchange import (
    all_gather_in_batches,
    all_gather_rows,
    batches,
    cut,
    pool_singular_values,
    send_to_owners,
)
from megatron_llr.measurement.master_weights import MasterCopies, MasterWeights
from megatron_llr.measurement.owners import assign_owners
from megatron_llr.ranks import exchange, raise_together
from megatron_llr.spectrum import record_from_eigenvalues
from megatron_llr.spectrum.eigenvalues import eigenvalues_of
from megatron_llr.spectrum.farms import farms_eigenvalues
from megatron_llr.spectrum.record import SpectrumRecord, SpectrumTable

logger = logging.getLogger(__name__)

_METHODS = ("failed", "gram32", "gram64", "svd64", "pooled", "farms")
_WIDTH = len(fields(SpectrumRecord))

Spectrum = tuple[torch.Tensor, str]
"""[N] fp64 eigenvalues, ascending, and how they were got."""


@dataclass(frozen=True)
class Measurement:
    """Result of one measurement.

    Attributes:
        table: record of every measured matrix, in matrix_index order.
        spectra: singular values of every measured matrix, [N] fp64 ascending, on CPU; empty on
            ranks that do not read them.
        seconds: wall time on this rank.
    """

    table: SpectrumTable
    spectra: dict[str, torch.Tensor]
    seconds: float


def _encode(record: SpectrumRecord) -> list[float]:
    values = list(astuple(record))
    values[-1] = _METHODS.index(record.method)
    return [math.nan if value is None else float(value) for value in values]


def _decode(row: Sequence[float], estimator: str) -> SpectrumRecord:
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
        config: `spectrum`, `estimator`, `embedding` and the windows of farms are read.
        masters: fp32 copies to measure, instead of the model's own weights.
    """

    def __init__(
        self,
        shards: Sequence[MatrixShard],
        matrix_index: MatrixIndex,
        config: LLRConfig,
        masters: MasterCopies | None = None,
    ) -> None:
        self._config = config
        wanted = [
            info
            for matrix, info in matrix_index.items()
            if info.tunable and (matrix not in EMBEDDING_IDS or config.embedding == "measured")
        ]
        self.owners = assign_owners(wanted)
        """Matrix id -> global rank that computes its spectrum, in matrix_index order."""
        self.readers: Collection[int] = range(dist.get_world_size())
        """Global ranks that get the singular values, all at first; the same on every rank."""
        self._owned_by_rank: list[list[str]] = [[] for _ in range(dist.get_world_size())]
        for matrix, owner in self.owners.items():
            self._owned_by_rank[owner].append(matrix)
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
        """Compute every spectrum once, share the results. Enter on all ranks.

        Raises:
            RuntimeError: on every rank, if any rank ran out of memory or lost its device; on those
            that are left, if a rank died.
        """
        started = time.perf_counter()
        self._error = None
        owned: dict[str, Spectrum] = {}
        records: dict[str, SpectrumRecord] = {}
        with exchange("a measurement"):
            for shards in self._sources():
                owned.update(self._unsplit(shards))
                split = [shard for shard in shards if shard.split]
                if split:
                    owned.update(self._exact(split) if self._is_exact else self._pooled(split))
        for matrix, spectrum in owned.items():
            with self._kept_for_later(matrix):
                records[matrix] = self._record(spectrum)
        raise_together(self._error)
        with exchange("a measurement"):
            table = self._share_records(records)
            shared = self._share_singular_values(owned, table)
        return Measurement(table, shared, time.perf_counter() - started)

    def _sources(self) -> Iterator[list[MatrixShard]]:
        """Shards of every group; over the fp32 weights where those are to be measured."""
        if self._masters is None:
            yield from self._by_group.values()
            return
        weights = self._masters.collect()
        for shards in self._by_group.values():
            yield [
                replace(shard, parameter=torch.nn.Parameter(weights[id(shard.parameter)]))
                for shard in shards
            ]

    @property
    def _is_exact(self) -> bool:
        return self._config.spectrum != "sharded"

    def _unsplit(self, shards: Sequence[MatrixShard]) -> Iterator[tuple[str, Spectrum]]:
        """Spectra of the matrices that this rank owns and holds whole: nothing travels."""
        here = dist.get_rank()
        for shard in shards:
            if not shard.split and self.owners[shard.matrix] == here:
                yield shard.matrix, self._eigenvalues(shard, partial(cut, shard))

    def _exact(self, split: Sequence[MatrixShard]) -> Iterator[tuple[str, Spectrum]]:
        """Spectra of the split matrices that this rank owns; others only send their parts."""
        for batch in batches(split, self.owners):
            whole = send_to_owners(batch, self.owners)
            for shard in batch:
                if shard.matrix in whole:
                    read = partial(whole.__getitem__, shard.matrix)
                    yield shard.matrix, self._eigenvalues(shard, read)

    def _pooled(self, split: Sequence[MatrixShard]) -> Iterator[tuple[str, Spectrum]]:
        """Pooled spectra of the shards: no weight travels, singular values do."""
        here = dist.get_rank()
        local = [self._eigenvalues(shard, partial(cut, shard))[0].sqrt() for shard in split]
        for shard, pooled in zip(split, pool_singular_values(local, split), strict=True):
            if self.owners[shard.matrix] == here:
                yield shard.matrix, (pooled.square(), "pooled")

    def _eigenvalues(self, shard: MatrixShard, read: Callable[[], torch.Tensor]) -> Spectrum:
        """Eigenvalues of what `read` gives of a matrix, or NaN; collectives follow either way."""
        count = min(shard.placement.rows, shard.placement.columns)
        with self._kept_for_later(shard.matrix):
            weight = read()
            count = min(weight.shape)
            if count > 0:
                spectrum = self._solve(weight)
                if spectrum[1] == "failed":
                    logger.warning("megatron_llr: no eigenvalues of %s", shard.matrix)
                return spectrum
        nothing = torch.full((count,), math.nan, dtype=torch.float64, device=self._device)
        return nothing, "failed"

    def _solve(self, weight: torch.Tensor) -> Spectrum:
        full = self._config.estimator != "hill_median"
        if self._config.spectrum == "farms":
            rows, windows = self._config.farms_rows, self._config.farms_windows
            return farms_eigenvalues(weight, rows, windows, full=full)
        return eigenvalues_of(weight, full=full)

    @contextlib.contextmanager
    def _kept_for_later(self, matrix: str) -> Iterator[None]:
        """Keep an error until all ranks can raise it: out of memory, a lost device."""
        try:
            yield
        except Exception as caught:
            self._error = self._error or topology_error(
                f"the spectrum of {matrix} cannot be computed",
                got=f"{type(caught).__name__}: {first_line(caught)}",
                allowed="room for the matrix and its Gram matrix, in fp32 or fp64, on its owner",
                remedy="lower --micro-batch-size or take --llr-spectrum sharded if memory ran out",
            )

    def _record(self, spectrum: Spectrum) -> SpectrumRecord:
        eigenvalues, method = spectrum
        estimators = (self._config.estimator,)
        return record_from_eigenvalues(eigenvalues, estimators=estimators, method=method)

    def _share_records(self, records: dict[str, SpectrumRecord]) -> SpectrumTable:
        owned = self._owned_by_rank
        mine = [_encode(records[matrix]) for matrix in owned[dist.get_rank()]]
        rows = torch.tensor(mine, dtype=torch.float64, device=self._device).view(-1, _WIDTH)
        shared = all_gather_rows(rows, [len(matrices) for matrices in owned])
        table = {
            matrix: _decode(row, self._config.estimator)
            for matrices, part in zip(owned, shared, strict=True)
            for matrix, row in zip(matrices, part.tolist(), strict=True)
        }
        return {matrix: table[matrix] for matrix in self.owners}

    def _share_singular_values(
        self, spectra: dict[str, Spectrum], table: SpectrumTable
    ) -> dict[str, torch.Tensor]:
        """Singular values of all matrices on the readers; nothing travels if there are none."""
        if not self.readers:
            return {}
        owned = self._owned_by_rank
        sizes = [[table[matrix].num_eigenvalues for matrix in part] for part in owned]
        mine = [spectra[matrix][0].sqrt() for matrix in owned[dist.get_rank()]]
        found: dict[str, torch.Tensor] = {}
        for rank, which, values in all_gather_in_batches(mine, sizes, self._device):
            if dist.get_rank() in self.readers:
                parts = values.cpu().split(sizes[rank][which])
                found.update(zip(owned[rank][which], parts, strict=True))
        return {matrix: found[matrix] for matrix in self.owners if matrix in found}
