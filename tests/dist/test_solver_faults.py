"""An eigensolver that fails on one rank for one matrix, in the real loop."""

import csv
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from harness import Run, train

from megatron_llr.matrices.shard import MatrixShard
from megatron_llr.measurement import measure
from megatron_llr.measurement.measure import SpectrumEngine
from megatron_llr.ranks import gather_objects, together
from megatron_llr.spectrum import eigenvalues

pytestmark = pytest.mark.world_size(2)

TP2 = "--tensor-model-parallel-size 2"
# Neither the smallest nor the largest exponent has it: its multiplier is no bound.
MATRIX = "block.1.attention.k"
Solver = Callable[[torch.Tensor], torch.Tensor]


def does_not_converge(matrix: torch.Tensor) -> torch.Tensor:
    raise torch.linalg.LinAlgError("did not converge")


def gives_nan(matrix: torch.Tensor) -> torch.Tensor:
    return torch.full(matrix.shape[:1], math.nan, dtype=matrix.dtype)


def out_of_memory(matrix: torch.Tensor) -> torch.Tensor:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee the docs.")


class Faults:
    """Solvers of torch.linalg that fail while `MATRIX` is measured, where and when told.

    Attributes:
        armed: whether they fail now.
        calls: how often they did on this rank.
    """

    def __init__(self, patch: pytest.MonkeyPatch, solvers: str, fails: Solver) -> None:
        self.armed, self.calls, self._measured = True, 0, ""
        whole = SpectrumEngine._eigenvalues

        def noted(engine: SpectrumEngine, shard: MatrixShard, read: object) -> object:
            self._measured = shard.matrix
            return whole(engine, shard, read)  # type: ignore[arg-type]

        patch.setattr(SpectrumEngine, "_eigenvalues", noted)
        for name in solvers.split():
            patch.setattr(torch.linalg, name, self._failing(getattr(torch.linalg, name), fails))

    def _failing(self, solve: Solver, fails: Solver) -> Solver:
        def solver(matrix: torch.Tensor) -> torch.Tensor:
            if self.armed and self._measured == MATRIX:
                self.calls += 1
                return fails(matrix)
            return solve(matrix)

        return solver


def from_update(faults: Faults, update: int) -> Callable[[Run, int, bool], None]:
    """Arm the faults during that update: they meet the measurements that follow it."""
    faults.armed = False

    def arm(run: Run, now: int, done: bool) -> None:
        faults.armed = faults.armed or now == update

    return arm


def assert_all_ranks_have(run: Run) -> None:
    told = gather_objects((run.multipliers, repr(run.alphas), repr(run.controller.state_dict())))
    assert told[0] == told[1]


def methods(folder: Path) -> dict[tuple[int, str], str]:
    """(iteration, matrix) -> method, from the CSV file."""
    dist.barrier()
    with (folder / "measurements.csv").open(newline="") as file:
        return {
            (int(row["iteration"]), row["matrix"]): row["method"] for row in csv.DictReader(file)
        }


@pytest.mark.parametrize("fails", [does_not_converge, gives_nan])
def test_a_matrix_that_no_solver_can_do_keeps_its_multiplier(
    fails: Solver,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    shared_dir: Path,
) -> None:
    """From the second measurement on; the first gave it a multiplier of its own."""
    faults = Faults(monkeypatch, "eigvalsh svdvals", fails)
    before: dict[str, float] = {}
    arm = from_update(faults, 3)

    def on_update(run: Run, update: int, done: bool) -> None:
        if update == 1 and not done:
            before.update(run.multipliers)
        arm(run, update, done)

    run = train(TP2, f"--llr-log-dir {shared_dir}", on_update=on_update)
    # On its owner alone, once by either solver (it is small: no fp32 first).
    assert sorted(gather_objects(faults.calls)) == [0, 2]
    assert len(run.losses) == 8
    assert all(math.isfinite(loss) for loss in run.losses)
    assert 1.0 < before[MATRIX] < 5.0
    assert run.multipliers[MATRIX] == before[MATRIX]
    assert run.multipliers["block.1.attention.q"] != before["block.1.attention.q"]
    assert math.isnan(run.alphas[MATRIX])
    assert_all_ranks_have(run)
    found = methods(shared_dir)
    assert (found[1, MATRIX], found[4, MATRIX]) == ("gram64", "failed")
    assert found[4, "block.1.attention.q"] == "gram64"
    if dist.get_rank() == 0:
        printed = capfd.readouterr().out
        assert "before update 4 in" in printed
        assert f"no usable exponent, multiplier kept: {MATRIX}\n" in printed
    if faults.calls:
        assert f"no eigenvalues of {MATRIX}" in caplog.text


@pytest.mark.parametrize(("small", "method"), [(512, "svd64"), (0, "gram64")])
def test_a_first_attempt_that_fails_changes_no_multiplier(
    small: int, method: str, monkeypatch: pytest.MonkeyPatch, shared_dir: Path
) -> None:
    """Of a small matrix in the fp64 Gram matrix, of a large one in fp32."""
    monkeypatch.setattr(eigenvalues, "SMALL", small)
    undisturbed = train(TP2)

    def first_fails(matrix: torch.Tensor) -> torch.Tensor:
        faults.armed = False
        return does_not_converge(matrix)

    faults = Faults(monkeypatch, "eigvalsh", first_fails)
    run = train(TP2, f"--llr-log-dir {shared_dir}")
    assert sorted(gather_objects(faults.calls)) == [0, 1]
    assert run.multipliers == pytest.approx(undisturbed.multipliers, rel=1e-5)
    assert run.losses == pytest.approx(undisturbed.losses, rel=1e-5)
    assert_all_ranks_have(run)
    usual = "gram64" if small else "gram32"
    found = methods(shared_dir)
    assert (found[1, MATRIX], found[4, MATRIX]) == (method, usual)
    assert {found[key] for key in found if key[1].startswith("block") and key != (1, MATRIX)} == {
        usual
    }


def test_a_shard_whose_solver_fails_spoils_the_pooled_spectrum(
    monkeypatch: pytest.MonkeyPatch, shared_dir: Path
) -> None:
    """--llr-spectrum sharded: every rank solves its own part; one rank's fails."""
    faults = Faults(monkeypatch, "eigvalsh svdvals", gives_nan)
    faults.armed = dist.get_rank() == 1
    run = train(TP2, f"--llr-spectrum sharded --exit-interval 1 --llr-log-dir {shared_dir}")
    assert run.multipliers[MATRIX] == 1.0
    assert_all_ranks_have(run)
    found = methods(shared_dir)
    assert found[1, MATRIX] == "failed"
    assert found[1, "block.1.attention.q"] == "pooled"


def ends_with(*flags: str) -> str:
    """The error that ends the job, the same on both ranks, in one line."""
    with pytest.raises(RuntimeError) as caught:
        train(*flags)
    told = gather_objects(str(caught.value))
    assert told[0] == told[1]
    assert "\n" not in told[0]
    return str(told[0])


def test_memory_that_runs_out_in_a_solver_ends_the_job_on_all_ranks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No other solver takes less."""
    faults = Faults(monkeypatch, "eigvalsh", out_of_memory)
    text = ends_with(TP2)
    owner = gather_objects(faults.calls).index(1)
    assert f"the spectrum of {MATRIX} cannot be computed: OutOfMemoryError: CUDA out of" in text
    assert "--llr-spectrum sharded" in text
    assert text.endswith(f"(rank {owner})")


@pytest.mark.parametrize("name", ["read_shard", "records_from_eigenvalues"])
def test_memory_that_runs_out_beside_a_solver_does_too(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading a weight (an fp8 one is dequantised), or fitting a tail: between two collectives."""
    if dist.get_rank() == 1:
        fails = lambda *_, **__: out_of_memory(torch.empty(0))  # noqa: E731
        monkeypatch.setattr(measure, name, fails)
    text = ends_with("")
    assert "the spectrum of block." in text
    assert text.endswith("(rank 1)")
    # Nobody waits for anybody: the ranks still agree.
    assert together(dist.get_world_size) == 2
