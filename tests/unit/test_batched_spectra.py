"""Batches of spectra give the results of single matrices, whatever is in a batch or fails.

On a CPU `batch_size` is 1, so these tests set the size of a batch.
"""

import math
from collections.abc import Callable

import pytest
import torch

from megatron_llr import analyze_matrix
from megatron_llr.spectrum import batched, cusolver, records_from_eigenvalues
from megatron_llr.spectrum.batched import batch_size, eigenvalues_in_batches, memory_of
from megatron_llr.spectrum.eigenvalues import eigenvalues_of


def gaussian(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def spiked(ratio: float) -> torch.Tensor:
    """Largest over median singular value of about `ratio`."""
    left, right = gaussian(600, 1, 8), gaussian(1, 700, 9)
    return gaussian(600, 700, 3) + left @ right * ratio * 25 / float(left.norm() * right.norm())


def with_nan() -> torch.Tensor:
    weight = gaussian(600, 700)
    weight[3, 4] = math.nan
    return weight


USUAL = [gaussian(600, 700, seed) for seed in range(5)]
KINDS = {
    "tall": gaussian(640, 600).bfloat16(),
    "small": gaussian(64, 96),
    "double": gaussian(600, 650).double(),
    "float8": gaussian(600, 610).to(torch.float8_e4m3fn),
    "overflow": gaussian(600, 700) * 1e25,
    "underflow": gaussian(600, 700) * 1e-24,
    "nan": with_nan(),
    "zero": torch.zeros(600, 600),
    "wide": spiked(3e3),
    "wider": spiked(3e6),
}


@pytest.mark.parametrize("size", [1, 2, 4, 100])
def test_every_kind_of_matrix_is_solved_as_a_single_one_is(
    size: int, caplog: pytest.LogCaptureFixture
) -> None:
    weights = [*USUAL, *KINDS.values()]
    names = [*(f"usual{index}" for index in range(len(USUAL))), *KINDS]
    spectra = eigenvalues_in_batches(weights, names=names, size_of_batch=size)
    for name, weight, (values, method) in zip(names, weights, spectra, strict=True):
        expected, expected_method = eigenvalues_of(weight)
        assert method == expected_method, name
        scale = float(expected[-1]) or 1.0
        assert torch.allclose(values / scale, expected / scale, atol=1e-6, equal_nan=True), name
    warned = {name for name in names if f"{name}: values that are not finite" in caplog.text}
    assert warned == {"overflow", "nan"}
    assert "do not add up" not in caplog.text


def test_an_exponent_does_not_depend_on_the_batch() -> None:
    def exponents(order: list[int], size: int) -> dict[int, float]:
        spectra = eigenvalues_in_batches([USUAL[index] for index in order], size_of_batch=size)
        records = records_from_eigenvalues([e for e, _ in spectra], methods=[m for _, m in spectra])
        return {i: record.alpha_hill_median for i, record in zip(order, records, strict=True)}

    single = {index: analyze_matrix(weight).alpha_hill_median for index, weight in enumerate(USUAL)}
    for order, size in (([0, 1, 2, 3, 4], 5), ([4, 2, 0, 1, 3], 2), ([3, 0, 4, 1, 2], 3)):
        assert exponents(order, size) == pytest.approx(single, rel=1e-6)
    assert exponents([0, 1, 2, 3, 4], 2) == exponents([0, 1, 2, 3, 4], 2)


def test_searched_fits_start_in_fp64() -> None:
    spectra = eigenvalues_in_batches(USUAL, full=True, size_of_batch=3)
    assert {method for _, method in spectra} == {"gram64"}


SOLVE = torch.linalg.eigvalsh


def one_wrong(gram: torch.Tensor) -> torch.Tensor:
    values = SOLVE(gram)
    if gram.ndim == 3:
        values[1] *= 1.001
    return values


def one_nan(gram: torch.Tensor) -> torch.Tensor:
    values = SOLVE(gram)
    if gram.ndim == 3:
        values[1] = math.nan
    return values


def exchanged(gram: torch.Tensor) -> torch.Tensor:
    """Returns for the second matrix the eigenvalues of another of its shape and distribution."""
    values = SOLVE(gram)
    if gram.ndim == 3:
        values[1] = values[0]
    return values


@pytest.mark.parametrize("fails", [one_wrong, one_nan, exchanged])
def test_a_wrong_result_is_detected_and_solved_again(
    fails: Callable[[torch.Tensor], torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    expected = [eigenvalues_of(weight)[0] for weight in USUAL]
    monkeypatch.setattr(torch.linalg, "eigvalsh", fails)
    spectra = eigenvalues_in_batches(USUAL, names=list("abcde"), size_of_batch=5)
    for values, wanted in zip(spectra, expected, strict=True):
        assert torch.allclose(values[0], wanted, rtol=1e-5, atol=1e-3)
    assert [line.split(": ")[1] for line in caplog.text.splitlines()] == ["b"]
    assert "b: eigenvalues that do not add up" in caplog.text


def test_a_batch_whose_solver_raises_is_solved_one_by_one(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(gram: torch.Tensor) -> torch.Tensor:
        if gram.ndim == 3:
            raise torch.linalg.LinAlgError("did not converge")
        return SOLVE(gram)

    monkeypatch.setattr(torch.linalg, "eigvalsh", fails)
    spectra = eigenvalues_in_batches(USUAL, names=list("abcde"), size_of_batch=3)
    assert [method for _, method in spectra] == ["gram32"] * 5
    assert "a batch (a and 2 more) failed: _LinAlgError: did not converge" in caplog.text
    assert "a batch (d and 1 more) failed" in caplog.text


def test_memory_that_runs_out_halves_the_batch(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    sizes = []

    def fails(gram: torch.Tensor) -> torch.Tensor:
        sizes.append(len(gram))
        if len(gram) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return SOLVE(gram)

    monkeypatch.setattr(torch.linalg, "eigvalsh", fails)
    spectra = eigenvalues_in_batches(USUAL, names=list("abcde"), size_of_batch=5)
    assert [method for _, method in spectra] == ["gram32"] * 5
    assert sizes == [5, 3, 2, 2, 1]
    assert "(a and 4 more) failed: OutOfMemoryError: CUDA out of memory" in caplog.text
    assert "batches of 3 from here on" in caplog.text


def test_memory_that_runs_out_for_one_matrix_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(gram: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.linalg, "eigvalsh", fails)
    with pytest.raises(torch.OutOfMemoryError):
        eigenvalues_in_batches(USUAL, size_of_batch=4)


def test_a_lost_device_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    error = torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    def fails(gram: torch.Tensor) -> torch.Tensor:
        raise error

    monkeypatch.setattr(torch.linalg, "eigvalsh", fails)
    with pytest.raises(torch.AcceleratorError) as caught:
        eigenvalues_in_batches(USUAL, size_of_batch=4)
    assert caught.value is error


@pytest.mark.parametrize(
    ("size", "count", "expected"),
    [
        (64, 1, 1),
        (64, 2, 2),
        (1024, 42, 42),
        (1024, 168, 84),  # two batches of one size, where 152 would fit
        (2048, 168, 34),
        (2048, 15, 1),
        (2560, 224, 23),
        (2560, 8, 1),
        (4096, 100, 1),
    ],
)
def test_batches_on_a_gpu(size: int, count: int, expected: int) -> None:
    dtype = batched.gram_dtype(size, full=False)
    assert batch_size(size, count, dtype, 4e9, "cuda") == expected
    assert batch_size(size, count, dtype, 4e9, "cpu") == 1


def test_a_batch_respects_memory_and_the_solvers_counters() -> None:
    for size in (64, 512, 768, 1024, 2048, 2560):
        for memory in (0.0, 1e8, 4e9, 1e15):
            for count in (1, 2, 31, 500, 100_000):
                chosen = batch_size(size, count, torch.float32, memory, "cuda")
                assert 1 <= chosen <= count
                assert chosen * size * size <= 2**31 - 1
                assert chosen == 1 or chosen * memory_of(size, torch.float32) <= memory


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="expected a matrix"):
        eigenvalues_in_batches([torch.randn(8)])
    assert eigenvalues_in_batches([]) == []


def test_the_direct_solver_is_for_gpus_and_older_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not cusolver.is_wanted(torch.eye(4)[None])
    for version, solves in (("2.11.0+cu130", False), ("2.12.0", True), ("3.0.0a0", True)):
        monkeypatch.setattr(torch, "__version__", version)
        assert cusolver.torch_solves_batches() is solves


def test_torchs_solver_is_used_after_an_error_of_the_direct_one(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(gram: torch.Tensor) -> None:
        raise cusolver.CuSolverError("cusolverDnXsyevBatched returned status 7")

    monkeypatch.setattr(cusolver, "is_wanted", lambda gram: not cusolver._Broken.reason)
    monkeypatch.setattr(cusolver, "eigvalsh_batched", fails)
    monkeypatch.setattr(cusolver._Broken, "reason", "")
    spectra = eigenvalues_in_batches(USUAL, size_of_batch=2)
    assert [method for _, method in spectra] == ["gram32"] * 5
    assert caplog.text.count("returned status 7") == 1


def test_a_matrix_on_which_the_direct_solver_fails_is_solved_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def solve(gram: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return SOLVE(gram), torch.tensor([0, 3, 0, 0, 0], dtype=torch.int32)

    monkeypatch.setattr(cusolver, "is_wanted", lambda gram: True)
    monkeypatch.setattr(cusolver, "eigvalsh_batched", solve)
    spectra = eigenvalues_in_batches(USUAL, names=list("abcde"), size_of_batch=5)
    assert [method for _, method in spectra] == ["gram32"] * 5
    assert "b: eigenvalues" in caplog.text


def test_a_library_that_lacks_the_function_is_not_used() -> None:
    assert cusolver.bind("/nonexistent/libcusolver.so.12") is None
    assert cusolver.bind("libc.so.6") is None
