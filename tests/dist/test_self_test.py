"""The self-test's comparisons on real runs: they must see a defect."""

from typing import Any

import pytest
import torch
from harness import Run, train

from megatron_llr.megatron.stepped_elements import stepped_elements
from megatron_llr.tools.self_test.checks import difference
from megatron_llr.tools.self_test.rates import RateCheck


@pytest.mark.world_size(1, 2)
@pytest.mark.parametrize("flags", ["--bf16 --use-distributed-optimizer", ""])
def test_a_matrix_that_moves_at_another_rate_is_named(flags: str) -> None:
    """One matrix of this rank is moved by a tenth more than the optimizer moved it."""
    correct, defective = RateCheck((2, 5)), RateCheck((2, 5))
    before: dict[str, torch.Tensor] = {}
    matrix = "block.1.mlp.up"

    def observe(run: Run, update: int, done: bool) -> None:
        correct(run, update, done)
        chosen: list[Any] = [
            each
            for each in stepped_elements(run.model, run.optimizer)
            if each.matrix == matrix and bool(each.mask.any())
        ]
        if update == 5 and done:
            for number, each in enumerate(chosen):
                with torch.no_grad():
                    extra = 0.1 * (each.tensor - before[f"{number}"]).view(-1) * each.mask
                    each.tensor.view(-1).add_(extra)
        before.update({f"{i}": each.tensor.detach().clone() for i, each in enumerate(chosen)})
        defective(run, update, done)

    train(flags, "--lr-warmup-iters 0", on_update=observe)
    assert correct.failures == []
    assert correct.worst < 2e-2
    assert correct.compared > 0.8 * correct.elements
    if before:
        (failure,) = defective.failures
        assert failure.startswith(f"{matrix}, update 5: learning rate")
        assert defective.worst == pytest.approx(0.1, rel=0.1)


@pytest.mark.world_size(1)
def test_runs_that_differ_are_different() -> None:
    """Another seed, and one weight of equal losses."""
    one, other = train("--exit-interval 3", llr=False), train("--exit-interval 3", llr=False)
    assert difference(one, other) == ""
    assert difference(one, train("--exit-interval 3 --seed 7", llr=False)).startswith(
        "loss of update 1: "
    )
    name, weight = next(iter(other.model[0].named_parameters()))
    with torch.no_grad():
        weight.view(-1)[0] += 1e-3
    assert difference(one, other) == f"weight 0.{name.removeprefix('module.')}"
