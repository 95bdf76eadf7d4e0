"""Hyperball steps in kernels: against the formula, and against an operation for every window."""

import copy

import pytest
import torch

from tests.reference import hyperball
from tests.triton.adam import BETAS, EPS, OPTIMIZERS, RATE, GroupCounter
from tests.triton.hyperball import (
    ETA,
    IDS,
    MULTIPLIERS,
    PARAMETERS,
    PLAIN,
    HyperballModel,
    rows_of,
)


def expected(
    model: HyperballModel, key: str, before: torch.Tensor, update: int
) -> tuple[torch.Tensor, dict[str, float]]:
    """A parameter after a step by the formula in fp64, and the cosines of its matrices.

    From the moments after the step, which have their own tests.
    """
    first, second = model.moments(key)
    corrected = (second / (1 - BETAS[1] ** update)).sqrt() + EPS
    direction = first / (1 - BETAS[0] ** update) / corrected
    after, cosines = before.double().clone(), {}
    for role, spans in PARAMETERS[key][1].items():
        rows, matrix = rows_of(key, role), IDS[role]
        rate = ETA * model.optimizer.param_groups[0]["lr"] / RATE * MULTIPLIERS.get(matrix, 1.0)
        radius = torch.tensor(model.radii[matrix], dtype=torch.float64)
        weight, u = before[rows].double(), direction[rows]
        stepped = weight - rate * radius * hyperball.unit(u)
        scale = radius / stepped.norm()
        # Rows that pad the vocabulary follow, without being in a norm.
        held = [r for span in spans for r in range(span.local, span.local + span.count)]
        moved = before[held].double() - rate * radius / u.norm() * direction[held]
        after[held] = scale * moved
        cosines[role] = float((hyperball.unit(weight) * hyperball.unit(u)).sum())
    return after, cosines


def check(model: HyperballModel, before: dict[str, torch.Tensor], update: int) -> None:
    """Every matrix after a step against the formula, its norm, and its cosine."""
    cosines = dict(
        zip(model.hyperball.sums.matrices, model.hyperball.cosines.tolist(), strict=True)
    )
    for key in PARAMETERS:
        if key in PLAIN:
            continue
        after, cosine = expected(model, key, before[key], update)
        now = model.fp32(key)
        torch.testing.assert_close(now.double(), after, rtol=1e-6, atol=1e-8)
        for role, value in cosine.items():
            norm = float(now[rows_of(key, role)].double().norm())
            assert norm == pytest.approx(model.radii[IDS[role]], rel=1e-7)
            assert cosines[IDS[role]] == pytest.approx(value, abs=1e-7)


# The three forms of torch's AdamW have one computation in the kernel.
KINDS = [name for name in OPTIMIZERS if not name.startswith("torch AdamW,")]


@pytest.mark.parametrize("name", KINDS)
def test_a_fused_step_is_that_of_the_formula(name: str, device: str) -> None:
    """Every matrix of fused, sliced and padded parameters, at multipliers of its own."""
    model = HyperballModel(name, device, "fused")
    for update in range(1, 3):
        model.optimizer.param_groups[0]["lr"] = RATE * update / 4
        before = {key: model.fp32(key) for key in PARAMETERS}
        model.step(update)
        check(model, before, update)
        if model.masters:
            for key, weight in model.weights.items():
                fp32 = model.fp32(key)
                if device == "cpu" and weight.dtype == torch.bfloat16:
                    # Triton's interpreter truncates; a GPU rounds.
                    fp32 = (fp32.view(torch.int32) & -65536).view(torch.float32)
                assert torch.equal(weight.detach(), fp32.to(weight.dtype)), key
    assert model.inner.grouped.plan is None


def test_the_grouped_way_has_the_same_projection(device: str) -> None:
    model = HyperballModel("torch AdamW", device, "kernels")
    for update in range(1, 3):
        before = {key: model.fp32(key) for key in PARAMETERS}
        model.step(update)
        check(model, before, update)


def test_plain_tensors_are_stepped_as_without_a_projection(device: str) -> None:
    """In the same launch: rate, multiplier and decay of their own, and no sphere."""
    model = HyperballModel("torch AdamW", device, "fused", only=["down", *PLAIN])
    apart = [model.weights[key].detach().clone().view(-1) for key in PLAIN]
    embedding, norm = ({"params": [tensor]} for tensor in apart)
    embedding["lr"], norm["weight_decay"] = RATE * MULTIPLIERS[IDS["embedding"]], 0.0
    plain = OPTIMIZERS["torch AdamW"]([embedding, norm])
    for update in range(3):
        model.set_gradients(update)
        for tensor, key in zip(apart, PLAIN, strict=True):
            tensor.grad = model.stepped[key][0].tensor.grad
        model.optimizer.step()
        plain.step()
    for tensor, key in zip(apart, PLAIN, strict=True):
        torch.testing.assert_close(model.fp32(key).view(-1), tensor, rtol=1e-6, atol=1e-8)


def test_the_ways_agree_and_can_take_turns(device: str) -> None:
    """Weights, states, counters and cosines, also where tensors have no gradient."""
    ways = ("fused", "windows", "mixed")
    models = {
        way: HyperballModel("torch AdamW", device, "fused" if way == "mixed" else way)
        for way in ways
    }
    without = [[], [("qkv", 0), ("down", 1)], [("fc1", 0), ("norm", 0)], [("head", 1)]]
    for update in range(4):
        for way, model in models.items():
            model.set_gradients(update, without[update % 4])
            # A closure is stepped in the grouped way.
            closure = (lambda: None,) if way == "mixed" and update % 2 else ()
            model.optimizer.step(*closure)
    reference = models.pop("windows")
    for model in models.values():
        for key in PARAMETERS:
            torch.testing.assert_close(model.fp32(key), reference.fp32(key), rtol=1e-5, atol=1e-7)
            for one, two in zip(model.stepped[key], reference.stepped[key], strict=True):
                mine, other = (
                    model.optimizer.state[one.tensor],
                    reference.optimizer.state[two.tensor],
                )
                assert list(mine) == list(other)
                assert torch.equal(mine["step"], other["step"])
                torch.testing.assert_close(mine["exp_avg"], other["exp_avg"], rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(
            model.hyperball.cosines, reference.hyperball.cosines, rtol=0, atol=1e-6
        )


class LateStates(GroupCounter):
    """Creates the state of a tensor when it has its first gradient."""

    def step(self, closure: object = None) -> None:
        def is_due(tensor: torch.Tensor) -> bool:
            return getattr(tensor, "decoupled_grad", None) is not None

        every = self.param_groups
        self.param_groups = [
            {**group, "params": [t for t in group["params"] if is_due(t)]} for group in every
        ]
        super().step()
        for group, stepped in zip(every, self.param_groups, strict=True):
            group["step"] = stepped.get("step", 0)
        self.param_groups = every


def test_weights_in_the_state_before_the_first_gradient(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slice without a gradient follows the rest of its matrix: its weights are in the sums."""
    monkeypatch.setitem(OPTIMIZERS, "masters", lambda groups: LateStates(groups, masters=True))
    model = HyperballModel("masters", device, "fused", only=["down"])
    before = model.fp32("down")
    model.step(0, [("down", 1)])
    now = model.fp32("down")
    first, rest = now.view(-1).split([433, 2000 - 433])
    assert float(now.double().norm()) == pytest.approx(model.radii[IDS["down"]], rel=1e-7)
    ratio = rest / before.view(-1)[433:]
    assert float(ratio[0]) != 1.0
    torch.testing.assert_close(ratio, ratio[0].expand_as(ratio), rtol=1e-6, atol=0)
    assert not torch.equal(first, before.view(-1)[:433])


@pytest.mark.parametrize("way", ["fused", "kernels"])
def test_without_a_direction_a_matrix_keeps_every_bit(way: str, device: str) -> None:
    """No gradient, and a gradient of zeros: the others are stepped."""
    model = HyperballModel("torch AdamW", device, way)
    before = {key: model.fp32(key) for key in PARAMETERS}
    model.set_gradients(0, [("qkv", 0), ("qkv", 1)])
    model.stepped["fc1"][0].tensor.grad.zero_()
    model.optimizer.step()
    for key in ("qkv", "fc1"):
        assert torch.equal(model.fp32(key), before[key]), key
    for key in ("down", "head", *PLAIN):
        assert not torch.equal(model.fp32(key), before[key]), key


def test_a_step_that_the_scaler_skips_moves_nothing(device: str) -> None:
    """`found_inf` on the optimizer, as torch's GradScaler sets it; then steps go on."""
    model = HyperballModel("torch AdamW, fused", device, "fused")
    model.step(0)
    before = {key: model.fp32(key) for key in PARAMETERS}
    state = copy.deepcopy(model.optimizer.state_dict()["state"])
    optimizer = model.optimizer
    optimizer.grad_scale = torch.tensor(1.0, device=device)  # type: ignore[attr-defined]
    optimizer.found_inf = torch.tensor(1.0, device=device)  # type: ignore[attr-defined]
    model.step(1)
    for key in PARAMETERS:
        assert torch.equal(model.fp32(key), before[key]), key
    for number, values in optimizer.state_dict()["state"].items():
        for name, value in values.items():
            assert torch.equal(value, state[number][name]), (number, name)
    del optimizer.grad_scale, optimizer.found_inf  # type: ignore[attr-defined]
    model.step(2)
    check(model, before, 2)


def test_norms_are_constant_over_100_updates(device: str) -> None:
    model = HyperballModel("group counter", device, "fused", only=["fc1"])
    assert set(model.radii) == {IDS["gate"], IDS["up"]}
    for update in range(100):
        model.step(update)
    weight = model.fp32("fc1").double()
    for role in ("gate", "up"):
        norm = float(weight[rows_of("fc1", role)].norm())
        assert norm == pytest.approx(model.radii[IDS[role]], rel=1e-6)


def test_a_resumed_run_is_the_unbroken_one_to_the_bit(device: str) -> None:
    """The sums have one order; the states are the optimizer's own."""
    unbroken = HyperballModel("group counter", device, "fused", only=["qkv"])
    for update in range(2):
        unbroken.step(update)
    resumed = HyperballModel("group counter", device, "fused", only=["qkv"])
    for key, weight in resumed.weights.items():
        weight.data.copy_(unbroken.weights[key].data)
    resumed.optimizer.load_state_dict(copy.deepcopy(unbroken.optimizer.state_dict()))
    for model in (unbroken, resumed):
        for update in range(2, 4):
            model.step(update)
    assert torch.equal(unbroken.fp32("qkv"), resumed.fp32("qkv"))


def test_weights_in_the_state_are_stepped_only_by_the_fused_step(device: str) -> None:
    with pytest.raises(TypeError, match="needs fp32 weights in the optimizer"):
        HyperballModel("masters", device, "kernels")
    model = HyperballModel("masters", device, "fused", only=["down"])
    assert model.layer_groups.without_fp32_weights == {}
    model.set_gradients(0)
    before = model.fp32("down")
    with pytest.raises(RuntimeError, match=r"closure.*--use-precision-aware-optimizer"):
        model.optimizer.step(lambda: None)
    assert torch.equal(model.fp32("down"), before)
