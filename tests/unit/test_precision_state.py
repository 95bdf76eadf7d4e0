"""Spectra under every ambient precision setting, and of every dtype and kind of tensor."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode

from megatron_llr import analyze_matrix
from megatron_llr.spectrum import records_from_eigenvalues
from megatron_llr.spectrum.batched import eigenvalues_in_batches
from megatron_llr.spectrum.farms import farms_eigenvalues


@contextlib.contextmanager
def by_function(setter: Callable[[Any], None], inside: Any, after: Any) -> Iterator[None]:
    setter(inside)
    try:
        yield
    finally:
        setter(after)


def by_name(backend: Any, inside: str) -> contextlib.AbstractContextManager[None]:
    """The newer interface: `fp32_precision` of a backend."""

    def restore(value: str) -> None:
        backend.fp32_precision = value
        if value == "none":
            torch.backends.cuda.matmul.fp32_precision = "none"
            torch.backends.mkldnn.matmul.fp32_precision = "none"

    return by_function(restore, inside, "none")


def tf32(value: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32 = value


AMBIENT: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "autocast cpu bf16": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "autocast cpu fp16": lambda: torch.autocast("cpu", dtype=torch.float16),
    "autocast cuda": lambda: torch.autocast("cuda", dtype=torch.bfloat16),
    "tf32, older name": lambda: by_function(tf32, True, False),
    "tf32, newer name": lambda: by_name(torch.backends.cuda.matmul, "tf32"),
    "tf32 everywhere": lambda: by_name(torch.backends, "tf32"),
    "bf16 on CPU": lambda: by_name(torch.backends.mkldnn.matmul, "bf16"),
    "matmul high": lambda: by_function(torch.set_float32_matmul_precision, "high", "highest"),
    "matmul medium": lambda: by_function(torch.set_float32_matmul_precision, "medium", "highest"),
    "deterministic": lambda: by_function(torch.use_deterministic_algorithms, True, False),
    "default fp64": lambda: by_function(torch.set_default_dtype, torch.float64, torch.float32),
    "default bf16": lambda: by_function(torch.set_default_dtype, torch.bfloat16, torch.float32),
    "inference": torch.inference_mode,
    "gradients": torch.enable_grad,
}
ESTIMATORS = ("hill_median", "ks", "fix_finger")


def weight_of(rows: int, columns: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows)
    left = torch.linalg.qr(torch.randn(rows, columns, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(columns, columns, generator=generator)).Q
    return (left * torch.arange(1, columns + 1).float().pow(-0.5) * 3) @ right.T


# Of more than 512 eigenvalues: their Gram matrix is fp32.
LARGE, OTHER, SMALL = weight_of(640, 600), weight_of(650, 600), weight_of(96, 64)


def all_results() -> list[Any]:
    """One by one with every exponent, in a batch, and pooled over submatrices."""
    batch = eigenvalues_in_batches([LARGE, OTHER, SMALL.bfloat16(), SMALL], size_of_batch=2)
    records = [
        record
        for pair in (batch[:2], batch[2:])
        for record in records_from_eigenvalues([e for e, _ in pair], methods=[m for _, m in pair])
    ]
    pooled = farms_eigenvalues(LARGE, 560, 2)[0]
    return [
        analyze_matrix(LARGE),
        analyze_matrix(SMALL, ESTIMATORS),
        *records,
        records_from_eigenvalues([pooled], methods=["farms"])[0],
    ]


@pytest.fixture(scope="module")
def plain() -> list[Any]:
    return all_results()


@pytest.mark.parametrize("name", AMBIENT)
def test_ambient_precision_changes_nothing(name: str, plain: list[Any]) -> None:
    with AMBIENT[name]():
        inside = all_results()
    assert inside == plain
    assert [record.method for record in inside[2:4]] == ["gram32", "gram32"]


FLOATS = sorted(
    {
        dtype
        for dtype in vars(torch).values()
        if isinstance(dtype, torch.dtype) and dtype.is_floating_point
    },
    key=str,
)


def test_all_float_dtypes_are_covered() -> None:
    names = {str(dtype) for dtype in FLOATS}
    assert {"torch.float8_e4m3fn", "torch.bfloat16", "torch.float64"} <= names


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_float_dtype_is_correct_or_rejected(dtype: torch.dtype) -> None:
    """float4_e2m1fn_x2 holds two values in an element: such a tensor has another shape."""
    if "x2" in str(dtype):
        packed = torch.ones(64, 64, dtype=torch.uint8).view(dtype)
        with pytest.raises(
            ValueError, match=r"expected a matrix of a float dtype, got torch\.float"
        ):
            analyze_matrix(packed)
        return
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(0)).abs().to(dtype)
    record, expected = analyze_matrix(weight), analyze_matrix(weight.double())
    assert record.alpha_hill_median == pytest.approx(expected.alpha_hill_median, rel=1e-5)
    assert record.frobenius_norm == pytest.approx(float(weight.double().norm()), rel=1e-6)
    ((values, method),) = eigenvalues_in_batches([weight], size_of_batch=1)
    assert method == "gram64"
    assert float(values.sum().sqrt()) == pytest.approx(record.frobenius_norm, rel=1e-6)


class Plain(torch.Tensor):
    """A subclass that changes nothing."""


class Wrapped(torch.Tensor):
    """Stores its values elsewhere and cannot return them."""

    @classmethod
    def __torch_dispatch__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(str(function))


class Quantized(Wrapped):
    """Has `dequantize`, as quantized parameters of Transformer Engine do."""

    values: torch.Tensor

    def dequantize(self, *_: Any) -> torch.Tensor:
        return self.values


def wrapped(kind: type, values: torch.Tensor) -> torch.Tensor:
    made = torch.Tensor._make_wrapper_subclass(kind, values.shape, dtype=values.dtype)
    made.values = values
    return made


VALUES = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "weight",
    [
        torch.nn.Parameter(VALUES),
        VALUES.as_subclass(Plain),
        wrapped(Quantized, VALUES),
        VALUES.T.contiguous().T,
        torch.stack([VALUES, VALUES], dim=2)[:, :, 0],
        VALUES.expand(2, 64, 96)[1],
        torch.complex(VALUES, VALUES).real,
        torch.complex(VALUES, -VALUES).conj().imag,
    ],
    ids="parameter subclass quantized transposed strided expanded real negative".split(),
)
def test_other_tensors_are_read_correctly(weight: torch.Tensor) -> None:
    expected = analyze_matrix(VALUES.clone())
    assert analyze_matrix(weight).alpha_hill_median == pytest.approx(
        expected.alpha_hill_median, rel=1e-9
    )
    ((values, _),) = eigenvalues_in_batches([weight], size_of_batch=1)
    assert float(values[-1].sqrt()) == pytest.approx(expected.spectral_norm, rel=1e-9)


def test_a_tensor_of_whole_numbers_with_a_scale_is_dequantized() -> None:
    weight = torch.quantize_per_tensor(VALUES, 0.05, 0, torch.qint8)
    expected = analyze_matrix(weight.dequantize())
    assert analyze_matrix(weight) == expected


def fake() -> torch.Tensor:
    with FakeTensorMode():
        return torch.empty(64, 96)


NO_MATRICES: dict[str, Callable[[], Any]] = {
    "complex": lambda: VALUES.to(torch.complex64),
    "integers": lambda: VALUES.int(),
    "bytes": lambda: VALUES.to(torch.uint8),
    "bool": lambda: VALUES > 0,
    "sparse": lambda: VALUES.to_sparse(),
    "sparse rows": lambda: VALUES.to_sparse_csr(),
    "nested": lambda: torch.nested.nested_tensor([VALUES[0], VALUES[1, :9]], layout=torch.jagged),
    "meta": lambda: VALUES.to("meta"),
    "fake": fake,
    "wrapped": lambda: wrapped(Wrapped, VALUES),
    "list": lambda: VALUES.tolist(),
    "none": lambda: None,
    "vector": lambda: VALUES[0],
    "stack": lambda: VALUES[None],
    "number": lambda: torch.tensor(1.0),
    "no rows": lambda: VALUES[:0],
    "no columns": lambda: VALUES[:, :0],
}


@pytest.mark.parametrize("kind", NO_MATRICES)
def test_anything_but_a_matrix_is_rejected_in_one_line(kind: str) -> None:
    weight = NO_MATRICES[kind]()
    for analyze in (analyze_matrix, lambda w: eigenvalues_in_batches([w])):
        with pytest.raises(ValueError, match=r"^expected a ") as caught:
            analyze(weight)
        assert "\n" not in str(caught.value)
