"""Recording of real steps: the kernel gives the results of one norm per window."""

import math
from typing import Any

import pytest
import torch

from megatron_llr.param_groups import square_sums
from megatron_llr.param_groups.inner_groups import InnerGroups
from megatron_llr.param_groups.step_recorder import StepRecorder
from megatron_llr.param_groups.stepped_tensor import SteppedTensor

PARTS = {
    "qkv": (("q", ((0, 900), (1800, 2700))), ("k", ((900, 1800), (2700, 3600)))),
    "rest": (("q", ((0, 13),)), ("k", ((13, 5000),))),
    "padding": (("head", ()),),
    "expert": (("expert", ((5, 2900),)),),
}
SIZES = {"qkv": 3600, "rest": 5000, "padding": 64, "expert": 3000}
OPTIMIZERS = (("qkv", "rest", "padding"), ("expert",))
MATRICES = ["head", "expert", "q", "elsewhere", "k"]
COUNTS = [0, 2895, 1813, 0, 6787]


class Job:
    """Two inner optimizers, one of them of experts; every matrix at its own rate."""

    def __init__(self, device: str, way: str, *, batched: bool) -> None:
        generator = torch.Generator().manual_seed(1)
        self.tensors = {
            name: torch.nn.Parameter(torch.randn(size, generator=generator).to(device))
            for name, size in SIZES.items()
        }
        self.inner = []
        for number, names in enumerate(OPTIMIZERS):
            optimizer = torch.optim.AdamW([self.tensors[n] for n in names], lr=0.01 * (number + 1))
            parts: Any = {
                id(self.tensors[n]): (SteppedTensor(self.tensors[n], self.tensors[n]), PARTS[n])
                for n in names
            }
            inner = InnerGroups(optimizer, parts, decoupled_decay=False, step=way)
            inner.multipliers = {m: 1 + i / 2 for i, m in enumerate(inner.matrices)}
            self.inner.append(inner)
        self.recorder = StepRecorder(
            [(inner, list(inner.parts.values())) for inner in self.inner],
            MATRICES,
            torch.device(device),
            updates=True,
            batched=batched,
        )

    def step(self, *, record: bool) -> None:
        self.recorder.arm(record=record)
        for tensor in self.tensors.values():
            tensor.grad = torch.ones_like(tensor)
        for inner in self.inner:
            inner.optimizer.step()


@pytest.mark.parametrize("way", ["fused", "grouped"])
def test_both_routes_record_the_same(way: str, device: str) -> None:
    jobs = [Job(device, way, batched=batched) for batched in (True, False)]
    for record in (True, False, True):
        results = []
        for job in jobs:
            job.step(record=record)
            results.append(job.recorder.local_sums())
        batched, windowed = results
        assert batched.table.device.type == torch.device(device).type
        assert batched.elements.tolist() == COUNTS
        assert batched.recorded.tolist() == [count * record for count in COUNTS]
        for name in ("squares", "weighted_rates"):
            expected = getattr(windowed, name).tolist()
            assert getattr(batched, name).tolist() == pytest.approx(expected, rel=1e-9)
        # Two fp32 weights differ exactly in fp64, rounded in fp32.
        assert batched.changes.tolist() == pytest.approx(windowed.changes.tolist(), rel=1e-6)
        assert (batched.changes[1] > 0) == record
        norms, rates, relative, cosines = batched.ratios(COUNTS)
        q = torch.cat([job.tensors["qkv"][a:b] for a, b in PARTS["qkv"][0][1]])
        q = torch.cat([q, job.tensors["rest"][:13]])
        assert norms[2] == pytest.approx(float(q.detach().double().norm()), rel=1e-6)
        assert rates == pytest.approx([math.nan, 0.02, 0.01, math.nan, 0.01], nan_ok=True)
        assert cosines == [None] * len(COUNTS)
        missing = [value is None for value in relative]
        assert missing == [count == 0 or not record for count in COUNTS]


def test_a_step_that_is_not_logged_reads_no_tensor(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Job(device, "grouped", batched=True)
    with monkeypatch.context() as patch:
        for name in ("snapshot", "of_changes", "of_tensors"):
            patch.setattr(square_sums.SquareSums, name, None)
        job.step(record=False)
    job.step(record=True)
    assert job.recorder.local_sums().recorded.tolist() == COUNTS
