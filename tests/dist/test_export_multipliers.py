"""Exported multipliers in plain Megatron give the updates of the extension."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import Run, train
from megatron.training import training

from megatron_llr.policies import read_role_table
from megatron_llr.telemetry.read_logs import read_rows
from megatron_llr.tools.export_multipliers import cli

LAYOUTS = {1: "", 2: "--pipeline-model-parallel-size 2"}
ONE_RANK = pytest.mark.world_size(1)

# Fused matrices agree.
AGREEING = """
"{q,k,v}": 2
"{gate,up}": {multiplier: 0.5, weight_decay: 0}
block.1.attention.o: 0
o: {multiplier: 1, weight_decay: 2}
embedding: 3
"""


def overrides_of(path: Path) -> Any:
    """The exported module."""
    spec = importlib.util.spec_from_file_location("exported", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def train_plain(exported: Path, monkeypatch: pytest.MonkeyPatch, *flags: str) -> Run:
    """Plain Megatron with the exported overrides."""
    module, build = overrides_of(exported), training.get_megatron_optimizer
    groups = []

    def with_overrides(config: Any, model: Any, **kwargs: Any) -> Any:
        kwargs["config_overrides"] = module.config_overrides(config, model)
        optimizer = build(config, model, **kwargs)
        groups.extend(optimizer.param_groups)
        return optimizer

    with monkeypatch.context() as patched:
        patched.setattr(training, "get_megatron_optimizer", with_overrides)
        run = train(*flags, llr=False)
    # Their settings are the identity of groups in a checkpoint.
    keys = ("max_lr", "min_lr", "wd_mult", "is_expert_parallel")
    identities = [tuple(group[key] for key in keys) for group in groups]
    assert len(set(identities)) == len(identities) > 3
    return run


def export(folder: Path, name: str, *arguments: str) -> Path:
    """Export on one rank, from the checkpoint in a folder or from `--llr-log-dir log`."""
    target = folder / name
    if dist.get_rank() == 0:
        source = "log" if name == "logged.yaml" else "saved"
        assert cli.main([str(folder / source), str(target), *arguments]) == 0
    dist.barrier()
    return target


def assert_close(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> None:
    """Norm-wise: Adam makes large steps of elements with small gradients out of rounding."""
    assert ours.keys() == theirs.keys()
    errors = {m: float((w - theirs[m]).norm() / theirs[m].norm()) for m, w in ours.items()}
    assert max(errors.values()) < 1e-4, errors


@pytest.mark.world_size(1, 2)
@pytest.mark.parametrize("decay", ["coupled", "decoupled"])
def test_a_run_with_the_overrides_is_the_run_with_the_table(
    decay: str, shared_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All eight updates, with a warmup and a decay of the rate."""
    if dist.get_rank() == 0:
        (shared_dir / "t.yaml").write_text(AGREEING)
    dist.barrier()
    flags = f"--weight-decay 1.0 {LAYOUTS[dist.get_world_size()]}"
    table = f"--llr-policy fixed --llr-role-table {shared_dir}/t.yaml --llr-weight-decay {decay}"
    logs = f"--llr-log-dir {shared_dir}/log --llr-log-relative-update"
    run = train(flags, table, logs, f"--save {shared_dir}/saved --save-interval 8")
    ours = run.whole_weights()
    exported = export(shared_dir, "overrides.py", "--format", "megatron")
    plain = train_plain(exported, monkeypatch, flags)
    assert plain.losses == pytest.approx(run.losses, rel=1e-5)
    assert_close(ours, plain.whole_weights())
    # The same from the logs, which say that a frozen matrix did not move.
    logged = read_role_table(str(export(shared_dir, "logged.yaml")))
    assert {m: logged.row(m).multiplier for m in run.multipliers} == run.multipliers
    rows = [
        r for r in read_rows(shared_dir / "log" / "learning_rates.csv") if r["iteration"] == "8"
    ]
    still = {row["matrix"] for row in rows if float(row["relative_update"]) == 0}
    assert still == {"block.1.attention.o"}


@ONE_RANK
def test_measured_multipliers_up_to_fused_parameters(
    shared_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Update 2, the first at a rate that is not 0: from equal weights and gradients."""
    esd = f"--llr-weight-decay decoupled --save {shared_dir}/saved --save-interval 1"
    two = "--weight-decay 1.0 --exit-interval 2"
    run = train(esd, two)
    ours = run.whole_weights()
    capsys.readouterr()
    exported = export(shared_dir, "overrides.py", "--format", "megatron")
    lines = capsys.readouterr().out
    assert f"update 3, the first after the checkpoint {shared_dir}/saved/iter_0000002" in lines
    for block in range(4):
        for name in ("self_attention.linear_qkv", "mlp.linear_fc1"):
            assert f"  decoder.layers.{block}.{name}.weight: " in lines
    assert "linear_proj" not in lines
    plain = train_plain(exported, monkeypatch, two)
    theirs = plain.whole_weights()
    fused = {
        matrix for matrix in ours if matrix.rpartition(".")[2] in ("q", "k", "v", "gate", "up")
    }
    assert_close(
        {m: w for m, w in ours.items() if m not in fused},
        {m: w for m, w in theirs.items() if m not in fused},
    )
    assert any(not torch.allclose(ours[m], theirs[m], rtol=1e-4, atol=1e-6) for m in fused)
    table = read_role_table(str(export(shared_dir, "t.yaml")))
    assert {m: table.row(m).multiplier for m in run.multipliers} == run.multipliers
    other = export(shared_dir, "torchtitan.py", "--format", "torchtitan")
    assert "For --lr 0.002 --min-lr 0.0002 --weight-decay 1.0." in other.read_text()
    assert "wd_mult" in export(shared_dir, "automodel.yaml", "--format", "automodel").read_text()
    target = str(shared_dir / "none.yaml")
    assert cli.main([str(shared_dir / "saved"), target, "--decay", "coupled"]) == 1
    assert "--decay coupled has no effect" in capsys.readouterr().err


@ONE_RANK
def test_runs_that_plain_megatron_cannot_repeat_are_refused(
    shared_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save = f"--save {shared_dir}/saved --save-interval 1 --exit-interval 1"
    train("--llr-hyperball", save)
    target = str(shared_dir / "out.py")
    assert cli.main([str(shared_dir / "saved"), target, "--format", "megatron"]) == 1
    assert "--format megatron cannot hold the rates of a run with --llr-hyp" in (
        capsys.readouterr().err
    )
    export(shared_dir, "t.yaml")
