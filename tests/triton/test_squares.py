"""Sums of squares by the kernel against the CPU route: a norm per window."""

import pytest
import torch

from megatron_llr.matrices.layout import flat_ranges, interleaved, stacked
from megatron_llr.param_groups.square_sums import SquareSums

COLUMNS = 70
FP32, BF16 = torch.float32, torch.bfloat16
# A slice that begins and ends inside a row, one that is only padding, and one that is empty.
QKV = interleaved([("q", 8), ("k", 4), ("v", 4)], 4, 0, 64)
FUSED = stacked(("gate", "up"), 96, 0)
SLICES = {
    "qkv": (QKV, 0, 64 * COLUMNS),
    "qkv-rest": (QKV, 33, 64 * COLUMNS - 17),
    "fc1": (FUSED, 1005, 96 * COLUMNS - 3),
    "padding": ({"embedding": ()}, 0, 300),
    "empty": ({"embedding": ()}, 0, 0),
}


def model(dtypes: dict[str, torch.dtype], device: str) -> list[tuple[torch.Tensor, tuple]]:
    generator = torch.Generator().manual_seed(1)
    parts = []
    for name, (spans, start, stop) in SLICES.items():
        values = torch.randn(stop - start, generator=generator).mul_(1e-2)
        tensor = values.to(device, dtypes.get(name, FP32))
        parts.append(
            (tensor, tuple((m, flat_ranges(r, COLUMNS, start, stop)) for m, r in spans.items()))
        )
    return parts


ROWS = {
    matrix: row for row, matrix in enumerate(("up", "q", "k", "other", "v", "gate", "embedding"))
}


def exact(parts: list[tuple[torch.Tensor, tuple]], values: list[torch.Tensor]) -> list[float]:
    sums = [0.0] * len(ROWS)
    for (_, matrices), value in zip(parts, values, strict=True):
        for matrix, ranges in matrices:
            sums[ROWS[matrix]] += sum(float(value[a:b].square().sum()) for a, b in ranges)
    return sums


DTYPES = {
    "fp32": {},
    "bf16": dict.fromkeys(SLICES, BF16),
    "both": {"qkv": BF16},
    # The kernel does not read fp64; those tensors take the other route.
    "unread": {"fc1": torch.float64},
}


@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
def test_sums_and_changes_are_those_of_the_elements(
    dtypes: dict[str, torch.dtype], device: str
) -> None:
    parts = model(dtypes, device)
    sums, windows = (SquareSums(parts, ROWS, batched=batched) for batched in (True, False))
    place = torch.device(device)
    for _ in range(2):
        now = [tensor.double().cpu().clone() for tensor, _ in parts]
        result = sums.of_tensors(place)
        assert result.tolist() == pytest.approx(exact(parts, now), rel=1e-12)
        assert result.tolist() == pytest.approx(windows.of_tensors(place).tolist(), rel=1e-6)
        assert torch.equal(result, sums.of_tensors(place))
        before = sums.snapshot()
        for tensor, _ in parts:
            tensor.mul_(1.25).add_(1e-3)
        moved = [tensor.double().cpu() - old for (tensor, _), old in zip(parts, now, strict=True)]
        changes = sums.of_changes(before, place)
        assert changes is not None
        assert changes.tolist() == pytest.approx(exact(parts, moved), rel=1e-12)
    assert result[ROWS["other"]] == result[ROWS["embedding"]] == 0
    assert len(sums._tables) == len({t.dtype for t, _ in parts} & {FP32, BF16})


def test_other_memory_builds_the_table_again(device: str) -> None:
    parts = model({}, device)
    sums, place = SquareSums(parts, ROWS), torch.device(device)
    sums.of_tensors(place)
    (table,) = sums._tables
    sums.of_tensors(place)
    assert sums._tables[0] is table
    tensor = parts[0][0]
    tensor.data = tensor.data * 2
    now = [tensor.double().cpu().clone() for tensor, _ in parts]
    assert sums.of_tensors(place).tolist() == pytest.approx(exact(parts, now), rel=1e-12)
    assert sums._tables[0] is not table


def test_a_tensor_that_moved_to_another_route_has_no_change(device: str) -> None:
    parts = model({}, device)
    sums = SquareSums(parts, ROWS)
    before = sums.snapshot()
    sums._batched = False
    parts[0][0].data = parts[0][0].data.clone()
    assert sums.of_changes(before, torch.device(device)) is None


def test_no_tensor_at_all(device: str) -> None:
    sums, place = SquareSums([], ROWS), torch.device(device)
    assert sums.of_tensors(place).tolist() == [0.0] * len(ROWS)
    assert sums.of_changes(sums.snapshot(), place).tolist() == [0.0] * len(ROWS)
