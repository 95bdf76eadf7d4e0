"""Every optimizer that Megatron can build, on its real update."""

from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
from harness import Run, train

from megatron_llr.megatron import package_needs
from tests.dist.models import MODELS

_TP2 = "--tensor-model-parallel-size 2"
_EP2_MOE = f"--expert-model-parallel-size 2 {MODELS['moe-shared'].flags}"
_DUPLICATED = "--optimizer muon --muon-tp-mode duplicated"

# (flags, whether q, k, v have multipliers of their own, whether gate and up have), by world size.
OPTIMIZERS = {
    1: {
        "muon": ("--optimizer muon", True, False),
        "muon-bf16": ("--optimizer muon --bf16", True, False),
        # Gloo cannot gather what the layer-wise optimizer cuts over several replicas.
        "muon-layer-wise": ("--optimizer muon --bf16 --use-distributed-optimizer", True, False),
        "muon-unsplit": ("--optimizer muon --muon-no-split-qkv", False, False),
        "muon-lion": ("--optimizer muon --muon-scalar-optimizer lion", True, False),
        "soap": ("--optimizer soap", False, False),
        "lion": ("--optimizer lion", True, True),
    },
    2: {
        "muon-blockwise": (f"--optimizer muon {_TP2}", True, False),
        "muon-duplicated": (f"{_DUPLICATED} {_TP2} --num-query-groups 4", True, False),
        "muon-duplicated-unsplit": (f"{_DUPLICATED} --muon-no-split-qkv {_TP2}", False, False),
        "muon-ep2-moe": (f"--optimizer muon {_EP2_MOE}", True, False),
        "muon-pp2-bf16": ("--optimizer muon --bf16 --pipeline-model-parallel-size 2", True, False),
    },
}
CASES = [
    pytest.param(*case, id=name, marks=pytest.mark.world_size(size))
    for size, cases in OPTIMIZERS.items()
    for name, case in cases.items()
]


def changes(flags: str, policy: str, decay: str = "coupled") -> tuple[Run, dict[str, torch.Tensor]]:
    """What update 2 did to every matrix: the first at a rate that is not 0, from equal weights."""
    before: dict[str, torch.Tensor] = {}
    after: dict[str, torch.Tensor] = {}

    def keep(run: Run, update: int, done: bool) -> None:
        if update == 2:
            (after if done else before).update(run.whole_weights())

    run = train(
        # A decay that a wrong factor would show, unless the flags have their own.
        "--weight-decay 1.0",
        flags,
        f"--llr-policy {policy} --llr-weight-decay {decay} --exit-interval 2",
        on_update=keep,
    )
    return run, {matrix: after[matrix] - weight for matrix, weight in before.items()}


@pytest.mark.parametrize(("flags", "qkv_apart", "mlp_apart"), CASES)
def test_every_matrix_moves_at_its_multiple_of_the_base_rate(
    flags: str, qkv_apart: bool, mlp_apart: bool
) -> None:
    """Update 2 with multipliers is the update without, times the multiplier; weight decay too.

    Embedding and head go by the rate of the scalar optimizer that steps them.
    """
    if "bf16" in flags:
        pytest.skip("bf16 weights do not show so small a change; the resume test runs it")
    _, plain = changes(flags, "uniform")
    run, moved = changes(flags, "esd")
    for matrix, change in plain.items():
        expected = run.multipliers[matrix] * change
        error = float((moved[matrix] - expected).norm() / expected.norm())
        assert error < 1e-3, (matrix, error)
    assert run.multipliers["embedding"] == run.multipliers["head"] == 5.0
    for roles, apart in (("qkv", qkv_apart), (("gate", "up"), mlp_apart)):
        prefix = "attention" if roles == "qkv" else "mlp"
        found = {run.multipliers[f"block.2.{prefix}.{role}"] for role in roles}
        assert len(found) == (len(roles) if apart else 1), roles


@pytest.mark.world_size(1)
def test_decoupled_decay_of_parts_under_muon() -> None:
    """q, k and v decay as at multiplier 1 while their updates are scaled."""
    flags = "--optimizer muon"
    _, both = changes(flags, "uniform")
    _, update_alone = changes(f"{flags} --weight-decay 0", "uniform")
    run, moved = changes(flags, "esd", decay="decoupled")
    for matrix in ("block.1.attention.q", "block.1.attention.k", "block.2.mlp.down"):
        decay = both[matrix] - update_alone[matrix]
        expected = run.multipliers[matrix] * update_alone[matrix] + decay
        assert float((moved[matrix] - expected).norm() / expected.norm()) < 1e-3, matrix


@pytest.mark.parametrize(("flags", "_qkv", "_mlp"), CASES)
def test_uniform_is_plain_megatron_and_a_resume_is_the_unbroken_run(
    flags: str, _qkv: bool, _mlp: bool, shared_dir: object
) -> None:
    """Invariants 1 and 3."""
    plain = train(flags, llr=False)
    assert train(flags, "--llr-policy uniform").losses == plain.losses
    if "soap" in flags:
        with pytest.raises(AssertionError, match="does not match model shape"):
            train(flags, f"--save {shared_dir} --save-interval 5", llr=False)
        pytest.skip("megatron-core 0.19.2 cannot save SOAP's state")
    unbroken = train(flags, f"--save {shared_dir} --save-interval 5")
    assert unbroken.losses[3:] != plain.losses[3:]
    resumed = train(flags, f"--load {shared_dir} --ckpt-step 5")
    assert resumed.losses == unbroken.losses[5:]
    weights = unbroken.parameters()
    for name, weight in resumed.parameters().items():
        assert torch.equal(weight, weights[name]), name


@pytest.mark.world_size(1)
@pytest.mark.parametrize("granularity", ["role", "block", "parameter"])
def test_matrices_that_cannot_be_stepped_apart_share_at_any_granularity(granularity: str) -> None:
    """Keys and values too small to be measured count as 1 at every measurement, not as what they
    shared before: constant targets give constant multipliers.
    """
    found: list[dict[str, float]] = []
    train(
        "--optimizer muon --muon-no-split-qkv --num-query-groups 1 --exit-interval 6",
        f"--llr-granularity {granularity} --llr-policy blockwise",
        "--llr-interval 2 --llr-ramp-iters 0",
        on_update=lambda run, update, done: found.append(run.multipliers),
    )
    for fused in (("attention.q", "attention.k", "attention.v"), ("mlp.gate", "mlp.up")):
        assert len({found[0][f"block.0.{role}"] for role in fused}) == 1
    assert all(multipliers == found[0] for multipliers in found)


@pytest.mark.world_size(1)
def test_a_resume_may_turn_off_what_stepped_parts(shared_dir: object) -> None:
    """--muon-no-split-qkv, inside a ramp: q, k and v go on with the mean of what they had."""
    saved = train("--optimizer muon --exit-interval 5", f"--save {shared_dir} --save-interval 5")
    q, k, v = (f"block.1.attention.{role}" for role in "qkv")
    assert len({saved.multipliers[matrix] for matrix in (q, k, v)}) == 3
    run = train(f"--optimizer muon --muon-no-split-qkv --load {shared_dir} --exit-interval 6")
    document = run.controller.state_dict()["schedule"]
    for table, before in (("old", "old"), ("new", "new")):
        values = saved.controller.state_dict()["schedule"][before]
        # Two query groups for four heads.
        mean = (2 * values[q] + values[k] + values[v]) / 4
        assert [document[table][m] for m in (q, k, v)] == [pytest.approx(mean)] * 3


@pytest.mark.world_size(2)
def test_masters_dealt_to_one_replica_each_are_refused_by_name() -> None:
    """The layer-wise optimizer: what another replica steps, this one cannot read."""
    flags = "--optimizer muon --bf16 --use-distributed-optimizer --llr-spectrum-source master"
    with pytest.raises(ValueError, match=r"--llr-spectrum-source master needs.*model"):
        train(flags)


@pytest.mark.world_size(1)
def test_adaptive_muon_is_refused_since_plain_megatron_cannot_run_it() -> None:
    """When the first line passes, the refusal can go."""
    with pytest.raises(AttributeError, match="scale_mode"):
        train("--optimizer adaptive_muon --exit-interval 1", llr=False)
    with pytest.raises(ValueError, match="--optimizer is not supported yet: Megatron's adaptive"):
        train("--optimizer adaptive_muon")


@pytest.mark.world_size(1)
def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(package_needs, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'megatron-llr\[muon\]'"):
        train("--optimizer muon")


def steps_of(run: Run) -> set[int]:
    """Step counters of Megatron's param groups."""
    return {group["step"] for group in run.optimizer.param_groups if group["params"]}


@pytest.mark.world_size(1, 2)
def test_a_skipped_step_advances_nothing() -> None:
    """fp16 with a loss scale that overflows: such an iteration is no update, multiplies nothing.

    Megatron's dynamic scale halves at every overflow; from 2^20 it takes about six.
    """
    flags = "--fp16 --initial-loss-scale 1048576 --hysteresis 1 --train-iters 16 "
    flags += "--lr-decay-iters 8 --llr-active-iters 6"
    if dist.get_world_size() == 2:
        flags += " --use-distributed-optimizer"
    plain_flags = flags.replace("--llr-active-iters 6", "")
    seen: list[tuple[int, int, float]] = []

    def keep(run: Run, update: int, done: bool) -> None:
        if done:
            rates = list(run.multipliers.values())
            assert all(rate == rate and 1.0 <= rate <= 5.0 for rate in rates)
            scale = float(run.optimizer.get_loss_scale())
            seen.append((update, run.controller.next_update, scale))

    plain = train(plain_flags, llr=False)
    uniform = train(flags, "--llr-policy uniform")
    assert uniform.losses == plain.losses
    assert steps_of(uniform) == steps_of(plain)
    run = train(flags, on_update=keep)
    iterations, updates = seen[-1][0], seen[-1][1] - 1
    skipped = iterations - updates
    assert 3 <= skipped <= 9
    # One scale per overflow: the number of the next update stood still while the scale fell.
    overflows = [before for before, after in pairwise(seen) if after[1] == before[1]]
    assert len(overflows) >= skipped - 1
    assert steps_of(run) == {updates}
    assert run.controller.state_dict()["schedule"]["window_end"] == 6
