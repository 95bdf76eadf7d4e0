"""A measurement in batches: the same table as one by one, and errors that reach all ranks.

On a CPU matrices are solved one by one; here the size of a batch is given.
"""

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from harness import Run, train

from megatron_llr.measurement.measure import Measurement
from megatron_llr.ranks import gather_objects, together
from megatron_llr.spectrum import batched

pytestmark = pytest.mark.world_size(1, 2)

SOLVE = torch.linalg.eigvalsh


def flags() -> str:
    return "--tensor-model-parallel-size 2" if dist.get_world_size() == 2 else ""


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Batches of up to five, and how many matrices each solver call had."""
    found: list[int] = []

    def noted(gram: torch.Tensor) -> torch.Tensor:
        found.append(len(gram) if gram.ndim == 3 else 0)
        return SOLVE(gram)

    monkeypatch.setattr(torch.linalg, "eigvalsh", noted)
    return found


def in_fives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        batched, "batch_size", lambda size, count, dtype, memory, device: min(count, 5)
    )


def measured(run: Run) -> Measurement:
    run.controller._engine.readers = range(dist.get_world_size())
    found: Measurement = run.controller._engine.measure()
    return found


def assert_same(some: Measurement, others: Measurement, tolerance: float) -> None:
    assert some.table.keys() == others.table.keys()
    for matrix, record in some.table.items():
        other = dataclasses.asdict(others.table[matrix])
        for field, value in dataclasses.asdict(record).items():
            if isinstance(value, float) and tolerance:
                value = pytest.approx(value, rel=tolerance, nan_ok=True)
            assert other[field] == value, (matrix, field)
    assert some.spectra.keys() == others.spectra.keys()


@pytest.mark.parametrize("memory", ["4", "0.002"])
@pytest.mark.parametrize("estimator", ["hill_median", "ks"])
def test_a_table_is_the_same_in_batches(
    memory: str, estimator: str, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where memory is for a few matrices only, as the smaller batches show."""
    given = f"--llr-measure-memory {memory} --llr-estimator {estimator} --exit-interval 1"
    run = train(flags(), given)
    one_by_one = measured(run)
    assert set(sizes) == {0}
    in_fives(monkeypatch)
    sizes.clear()
    first = measured(run)
    told = list(sizes)
    assert_same(one_by_one, first, 1e-6)
    assert max(told) == 5 if memory == "4" else 0 < max(told) < 5, told
    sizes.clear()
    assert_same(first, measured(run), 0.0)
    assert sizes == told
    tables = gather_objects(repr(first.table))
    assert len(set(tables)) == 1


def test_a_run_trains_the_same_in_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = train(flags())
    in_fives(monkeypatch)
    run = train(flags())
    assert run.multipliers == pytest.approx(usual.multipliers, rel=1e-6)
    assert run.losses == pytest.approx(usual.losses, rel=1e-5)


def nan_in_stacks(gram: torch.Tensor) -> torch.Tensor:
    values = SOLVE(gram)
    if gram.ndim == 3:
        values[0] = math.nan
    return values


def raises_in_stacks(gram: torch.Tensor) -> torch.Tensor:
    if gram.ndim == 3:
        raise torch.linalg.LinAlgError("did not converge")
    return SOLVE(gram)


def no_memory_in_stacks(gram: torch.Tensor) -> torch.Tensor:
    if gram.ndim == 3 and len(gram) > 1:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    return SOLVE(gram)


@pytest.mark.parametrize("fails", [nan_in_stacks, raises_in_stacks, no_memory_in_stacks])
def test_what_fails_in_a_batch_alone_changes_nothing(
    fails: Callable[[torch.Tensor], torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    run = train(flags(), "--exit-interval 1")
    expected = measured(run)
    in_fives(monkeypatch)
    caplog.clear()
    if dist.get_rank() == 0:
        monkeypatch.setattr(torch.linalg, "eigvalsh", fails)
    assert_same(expected, measured(run), 1e-6)
    assert ("in a batch" in caplog.text or "a batch (block." in caplog.text) == (
        dist.get_rank() == 0
    )


def lost_device(gram: torch.Tensor) -> torch.Tensor:
    raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")


def no_memory(gram: torch.Tensor) -> torch.Tensor:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee the docs.")


@pytest.mark.parametrize("fails", [lost_device, no_memory])
def test_what_no_solver_can_mend_ends_the_job_on_all_ranks(
    fails: Callable[[torch.Tensor], torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    in_fives(monkeypatch)
    last = dist.get_world_size() - 1
    if dist.get_rank() == last:
        monkeypatch.setattr(torch.linalg, "eigvalsh", fails)
    with pytest.raises(RuntimeError, match=r"the spectrum of block\..* cannot be computed") as seen:
        train(flags())
    told = gather_objects(str(seen.value))
    assert len(set(told)) == 1
    assert "\n" not in told[0]
    if last:
        assert told[0].endswith(f"(rank {last})")
    # Nobody waits for anybody: the ranks still agree.
    assert together(dist.get_world_size) == dist.get_world_size()
