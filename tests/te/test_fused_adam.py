"""Transformer Engine's own FusedAdam: what every user on a cluster runs."""

from pathlib import Path
from typing import Any

import harness
import pytest
import torch
from harness import train

from megatron_llr.param_groups.inner_groups import InnerGroups
from megatron_llr.param_groups.probe import stepping
from megatron_llr.param_groups.stepped_tensor import SteppedTensor
from tests.te.kernels import FusedAdamOnCPU

SETTINGS = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
MULTIPLIERS = {"q": 1.5, "k": 5.0, "v": 0.25}
# q, k, v of two query groups, in a slice that begins and ends inside a row.
RANGES = {"q": [(0, 9), (21, 33)], "k": [(9, 15), (33, 39)], "v": [(15, 21), (39, 43)]}

_MASTERS = {"master_weights": True, "use_decoupled_grad": True}
# Settings, dtype of the tensors, in what pieces it can step.
VARIANTS: dict[str, tuple[dict[str, Any], torch.dtype, str]] = {
    "fp32": ({}, torch.float32, "contiguous"),
    "bf16-masters": (_MASTERS, torch.bfloat16, "contiguous"),
    "remainders": ({**_MASTERS, "store_param_remainders": True}, torch.bfloat16, "contiguous"),
    "fp16-moments": (
        {**_MASTERS, "exp_avg_dtype": torch.float16, "exp_avg_sq_dtype": torch.float16},
        torch.bfloat16,
        "whole",
    ),
    "bf16-moments": ({**_MASTERS, "exp_avg_dtype": torch.bfloat16}, torch.bfloat16, "whole"),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_the_probe_finds_what_it_can_step(name: str) -> None:
    settings, dtype, expected = VARIANTS[name]
    tensor = torch.nn.Parameter(torch.randn(8, 6).to(dtype))
    assert stepping(FusedAdamOnCPU([tensor], **SETTINGS, **settings)) == expected


@pytest.mark.parametrize("name", [n for n, (_, _, how) in VARIANTS.items() if how != "whole"])
def test_fifty_steps_are_those_of_separate_tensors(name: str) -> None:
    """Bitwise, whole state included; then the state is that of a plain optimizer."""
    settings, dtype, _ = VARIANTS[name]
    generator = torch.Generator().manual_seed(1)
    fused = torch.randn(43, generator=generator).to(dtype)

    def gather(tensor: torch.Tensor, matrix: str) -> torch.Tensor:
        return torch.cat([tensor[first:last] for first, last in RANGES[matrix]])

    apart = {matrix: gather(fused, matrix).clone() for matrix in RANGES}
    optimizer = FusedAdamOnCPU([{"params": [fused]}], **SETTINGS, **settings)
    parts = tuple((matrix, tuple(found)) for matrix, found in RANGES.items())
    master = SteppedTensor(fused, torch.nn.Parameter(fused))
    groups = InnerGroups(optimizer, {id(fused): (master, parts)}, decoupled_decay=False)
    groups.multipliers = MULTIPLIERS
    separate = FusedAdamOnCPU(
        [{"params": [apart[m]], "lr": 0.01 * MULTIPLIERS[m]} for m in RANGES],
        **{k: v for k, v in SETTINGS.items() if k != "lr"},
        **settings,
    )
    for step in range(50):
        gradient = torch.randn(43, generator=generator)
        for tensor, found in [(fused, gradient), *((apart[m], gather(gradient, m)) for m in apart)]:
            tensor.grad = found.to(dtype)
            tensor.decoupled_grad = found
        optimizer.step()
        separate.step()
        for matrix, tensor in apart.items():
            assert torch.equal(gather(fused, matrix), tensor), (matrix, step)
    for matrix, tensor in apart.items():
        for key, value in separate.state[tensor].items():
            assert torch.equal(gather(optimizer.state[fused][key], matrix), value), (matrix, key)
    assert list(optimizer.state) == [fused]
    assert optimizer.param_groups[0]["step"] == 50


@pytest.fixture
def fused_adam(monkeypatch: pytest.MonkeyPatch) -> None:
    """Megatron's loop builds FusedAdam, as it does on every GPU.

    What else Transformer Engine would do there runs on a GPU alone: Megatron's own stand-ins, which
    it uses without Transformer Engine, take its place.
    """
    import megatron.core.optimizer as optimizer_package
    from megatron.core import utils
    from megatron.core.optimizer import clip_grads, distrib_optimizer, optimizer
    from megatron.core.transformer import transformer_block
    from megatron.core.transformer.torch_norm import WrappedTorchNorm
    from megatron.training.utils import common_utils

    for module in (optimizer_package, distrib_optimizer):
        monkeypatch.setattr(module, "Adam", FusedAdamOnCPU)
    monkeypatch.setattr(distrib_optimizer, "USING_APEX_OPTIMIZER", False)
    monkeypatch.setattr(distrib_optimizer, "USING_TE_OPTIMIZER", True)
    monkeypatch.setattr(transformer_block, "LayerNormImpl", WrappedTorchNorm)
    for module in (clip_grads, optimizer, common_utils):
        monkeypatch.setattr(module, "multi_tensor_applier", utils.local_multi_tensor_applier)
    for module in (clip_grads, optimizer):
        monkeypatch.setattr(module, "multi_tensor_scale_impl", utils.local_multi_tensor_scale)
    monkeypatch.setattr(clip_grads, "multi_tensor_scale_tensor_impl", None)
    monkeypatch.setattr(clip_grads, "l2_norm_impl", utils.local_multi_tensor_l2_norm)
    monkeypatch.setattr(common_utils, "multi_tensor_l2norm", utils.local_multi_tensor_l2_norm)


_PRECISION = "--bf16 --use-distributed-optimizer --use-precision-aware-optimizer"
LOOPS = {
    "fp32": "",
    "bf16": "--bf16",
    "distopt": "--bf16 --use-distributed-optimizer",
    "precision-aware": _PRECISION,
    "precision-aware-bf16-moments": f"{_PRECISION} --exp-avg-dtype bf16 --exp-avg-sq-dtype bf16",
}


@pytest.mark.usefixtures("fused_adam")
@pytest.mark.parametrize("name", LOOPS)
def test_megatrons_loop_with_fused_adam(name: str, shared_dir: Path) -> None:
    """Uniform is plain Megatron to the bit, step counters too; a resume is the unbroken run."""
    flags = LOOPS[name]
    plain = train(flags, llr=False)
    uniform = train(flags, "--llr-policy uniform")
    assert uniform.losses == plain.losses
    assert counters(uniform) == counters(plain) == {8}
    run = train(flags, f"--save {shared_dir} --save-interval 5")
    assert run.losses[3:] != plain.losses[3:]
    assert counters(run) == {8}
    apart = len({run.multipliers[f"block.1.attention.{role}"] for role in "qkv"})
    assert apart == (1 if "moments" in name else 3)
    resumed = train(flags, f"--load {shared_dir} --ckpt-step 5")
    assert resumed.losses == run.losses[5:]


def counters(run: harness.Run) -> set[int]:
    return {group["step"] for group in run.optimizer.param_groups if group["params"]}
