"""Design invariants 1, 2 and 5 on Megatron's real loop, at every layout."""

from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from harness import Run, train
from layouts import HERE, Layout

from megatron_llr import assign_multipliers
from megatron_llr.megatron.stepped_elements import stepped_elements
from megatron_llr.ranks import gather_objects
from tests.reference import llr as reference

UPDATES = 8


@dataclass
class Runs:
    """The three runs that most tests ask about."""

    plain: Run
    uniform: Run
    esd: Run


@pytest.fixture(scope="module", params=HERE, ids=str)
def layout(request: pytest.FixtureRequest) -> Layout:
    """Every layout of this world size; pytest runs all tests of one before the next."""
    found: Layout = request.param
    return found


@pytest.fixture(scope="module")
def runs(layout: Layout) -> Runs:
    """Plain Megatron, the control policy, and LLR, from the same initial weights."""
    return Runs(
        plain=train(layout.flags, llr=False),
        uniform=train(layout.flags, "--llr-policy uniform"),
        esd=train(layout.flags),
    )


def test_uniform_is_plain_megatron_to_the_bit(runs: Runs) -> None:
    """Invariant 1; esd is not plain Megatron, so the comparison can fail."""
    assert len(runs.plain.losses) == UPDATES
    assert runs.plain.losses == runs.uniform.losses
    weights, controls = runs.plain.parameters(), runs.uniform.parameters()
    assert weights.keys() == controls.keys()
    for name, weight in weights.items():
        assert torch.equal(weight, controls[name]), name
    # The base rate of update 1 is 0, so the loss of update 3 is the first that can differ.
    assert runs.plain.losses[:2] == runs.esd.losses[:2]
    assert runs.plain.losses[3:] != runs.esd.losses[3:]


def test_multipliers_are_those_of_the_paper(runs: Runs) -> None:
    """Invariant 2: whatever the layout, what one process finds on the whole weights."""
    run = runs.esd
    measured = run.controller._engine.measure().table
    weights = run.whole_weights()
    alphas, multipliers = reference.multipliers(weights, 1.0, 5.0, ("embedding", "head"))
    assert set(measured) == set(alphas)
    assert len(alphas) >= 16
    found = assign_multipliers(
        {matrix: record.alpha_hill_median for matrix, record in measured.items()},
        run.controller.config,
    )
    for matrix, alpha in alphas.items():
        assert measured[matrix].alpha_hill_median == pytest.approx(alpha, rel=1e-5), matrix
        assert found[matrix] == pytest.approx(multipliers[matrix], rel=1e-5), matrix


def test_all_ranks_agree_to_the_bit(runs: Runs) -> None:
    """Invariant 2, second half: multipliers, exponents and state."""
    run = runs.esd
    told = gather_objects((run.multipliers, run.alphas, run.controller.state_dict()))
    assert all(other == told[0] for other in told)
    assert len(set(run.multipliers.values())) > 4


@pytest.mark.parametrize("decay", ["coupled", "decoupled", "alphadecay"])
def test_every_element_moves_at_its_own_rate(layout: Layout, decay: str) -> None:
    """Invariant 5: base(s) x multiplier(matrix, s), solved from the optimizer's real update; with
    decoupled decay every matrix decays as at multiplier 1; with the policy that sets the decay the
    rate is the base rate.
    """
    if decay != "coupled" and layout.name not in ("tp1", "tp2-bf16", "dp2-distopt-bf16"):
        pytest.skip("decoupled decay and alphadecay are run on three layouts")
    before: dict[int, torch.Tensor] = {}
    checked: list[int] = []
    multipliers: dict[str, float] = {}

    def check(run: Run, update: int, done: bool) -> None:
        # Update 2 holds the first multipliers, 5 lies inside a ramp, 8 after the window.
        if update not in (2, 5, 8):
            return
        if not done:
            multipliers.update(run.multipliers)
            for each in stepped_elements(run.model, run.optimizer):
                before[id(each.tensor)] = each.tensor.detach().clone()
            return
        base = reference.cosine(update, warmup=2, total=UPDATES, peak=2e-3, low=2e-4)
        for each in stepped_elements(run.model, run.optimizer):
            matrix, tensor, mask = each.matrix, each.tensor, each.mask
            multiplier = multipliers[matrix] if matrix else 1.0
            # Decoupled: rate x multiplier x (decay / multiplier).
            factor = {"coupled": 1.0, "decoupled": 1 / multiplier, "alphadecay": multiplier}[decay]
            rate = reference.adamw_rate_of(each.optimizer, tensor, before[id(tensor)], factor)
            # fp32 weights hold an update of 1e-3 to 1e-4 of it; elements that barely move, less.
            moved = (tensor.detach() - before[id(tensor)]).abs() > 0.05 * base
            chosen = rate.view(-1)[mask & moved.view(-1)]
            expected = base * (multiplier if decay != "alphadecay" else 1.0)
            assert chosen.numel() > 0 or mask.sum() < 200
            assert torch.allclose(chosen, torch.full_like(chosen, expected), rtol=2e-2), matrix
            if chosen.numel():
                # What is no matrix may be large, as Mamba's A_log: rounding shows more.
                tolerance = 1e-3 if matrix else 5e-3
                assert float(chosen.median()) == pytest.approx(expected, rel=tolerance), matrix
            checked.append(update)

    # A decay that a wrong factor would show: a tenth of the weight at rate 1.
    chosen = f"--llr-weight-decay {decay}" if decay != "alphadecay" else "--llr-policy alphadecay"
    train(layout.flags, f"--weight-decay 1.0 {chosen}", on_update=check)
    assert set(checked) == {2, 5, 8}
    assert max(multipliers.values()) > 2


@pytest.mark.world_size(1, 2)
def test_a_tied_embedding_has_one_rate_on_all_stages() -> None:
    """Its copy on the last stage steps alike, so that the copies stay equal."""
    flags = "--pipeline-model-parallel-size 2" if dist.get_world_size() == 2 else ""
    plain = train(flags, llr=False, tied=True)
    assert train(flags, "--llr-policy uniform", tied=True).losses == plain.losses
    run = train(flags, tied=True)
    assert run.multipliers["embedding"] == 5.0
    assert "head" not in run.multipliers
    names = ("embedding.word_embeddings.weight", "output_layer.weight")
    copies = [p for name, p in run.parameters().items() if name.endswith(names)]
    told = [copy for copies in gather_objects(copies) for copy in copies]
    assert len(told) == dist.get_world_size()
    assert all(torch.equal(copy, told[0]) for copy in told)


@pytest.mark.world_size(1, 2)
def test_sgd_steps_parts_too() -> None:
    flags = "--optimizer sgd --lr 0.1 --min-lr 0.01"
    plain = train(flags, llr=False)
    assert train(flags, "--llr-policy uniform").losses == plain.losses
    assert train(flags).losses[3:] != plain.losses[3:]
