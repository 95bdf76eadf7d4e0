"""Role tables on Megatron's loop: patterns, frozen matrices, factors on the weight decay."""

import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from harness import Run, train

from megatron_llr.ranks import gather_objects

pytestmark = pytest.mark.world_size(1, 2)

LAYOUTS = {1: "", 2: "--tensor-model-parallel-size 2"}
TABLE = """
block.*.attention.k: 0
block.2.attention.o: 0
block.3.mlp.*: {multiplier: 2, weight_decay: 0}
head: 0
block.9.*: 2
block.*: 1
"""
# Parts of the MLP's fused tensor, which Muon cannot step apart.
GATES = "block.{0,1}.mlp.gate: 0\n"
CASES = {
    "coupled": (GATES, ""),
    "decoupled": (GATES, "--llr-weight-decay decoupled"),
    "hyperball": (GATES, "--llr-hyperball"),
    "muon": ("", "--optimizer muon"),
    "muon-decoupled": ("", "--optimizer muon --llr-weight-decay decoupled"),
}


def use(table: Path, text: str) -> str:
    """Write a table, the same on all ranks, and the flags that use it."""
    if dist.get_rank() == 0:
        table.write_text(text)
    dist.barrier()
    layout = LAYOUTS[dist.get_world_size()]
    return f"{layout} --llr-policy fixed --llr-role-table {table} --llr-interval 4"


def printed(capfd: pytest.CaptureFixture[str]) -> str:
    """What all ranks printed since the last call."""
    return "\n".join(gather_objects(capfd.readouterr().out))


def first_norm(text: str) -> str:
    """The gradient norm of the first update, as Megatron logs it."""
    match = re.search(r"iteration +1/.*grad norm: ([\d.]+)", text)
    assert match is not None
    return match[1]


@pytest.mark.parametrize("case", CASES)
def test_frozen_matrices_stay_and_the_others_move(
    case: str, shared_dir: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    gates, flags = CASES[case]
    before: dict[str, torch.Tensor] = {}

    def keep(run: Run, update: int, done: bool) -> None:
        if update == 1 and not done:
            before.update(run.whole_weights())

    # A decay that would show.
    flags = f"{flags} --weight-decay 1.0"
    run = train(use(shared_dir / "t.yaml", gates + TABLE), flags, on_update=keep)
    text = printed(capfd)
    after = run.whole_weights()
    still = {matrix for matrix, weight in after.items() if torch.equal(weight, before[matrix])}
    expected = {"head", "block.2.attention.o", *(f"block.{b}.attention.k" for b in range(4))}
    expected |= {"block.0.mlp.gate", "block.1.mlp.gate"} if gates else set()
    assert still == expected
    assert {matrix for matrix, value in run.multipliers.items() if value == 0} == expected
    assert run.multipliers["block.3.mlp.up"] == 2.0
    assert text.count("1 of 30 matrices match no pattern and keep multiplier 1: embedding") == 1
    assert text.count("or an earlier pattern does: block.9.*") == 1
    reasons = "\n".join(gather_objects(run.controller.explain("block.2.attention.o")))
    assert "row 'block.2.attention.o' of --llr-role-table" in reasons
    assert re.search(r"weight decay +0$", reasons, re.M)
    # The gradients of frozen matrices count.
    megatrons = re.sub(r"--llr-\S+( decoupled)?", "", flags)
    train(LAYOUTS[dist.get_world_size()], megatrons, llr=False)
    assert first_norm(text) == first_norm(printed(capfd))


def test_a_factor_on_the_decay_is_one_on_megatrons(shared_dir: Path) -> None:
    """No decay in one block and three times as much in another, against --weight-decay."""
    table = "block.0.*: {weight_decay: 0}\nblock.1.attention.k: {multiplier: 2, weight_decay: 3}\n"
    runs = {
        "table": (use(shared_dir / "t.yaml", table), 0.1),
        "none": (use(shared_dir / "none.yaml", "block.1.attention.k: 2"), 0.0),
        "three": (use(shared_dir / "three.yaml", "block.1.attention.k: 2"), 0.3),
    }
    # Two updates: the first has rate 0, so that the gradients of the second are the same.
    weights = {
        name: train(flags, f"--weight-decay {decay} --exit-interval 2").whole_weights()
        for name, (flags, decay) in runs.items()
    }
    for matrix, weight in weights["table"].items():
        same_as_none = torch.equal(weight, weights["none"][matrix])
        assert same_as_none == matrix.startswith("block.0."), matrix
    matrix = "block.1.attention.k"
    torch.testing.assert_close(
        weights["table"][matrix], weights["three"][matrix], rtol=1e-6, atol=0
    )


def test_a_resume_continues_and_refuses_another_table(shared_dir: Path) -> None:
    flags = use(shared_dir / "t.yaml", GATES + TABLE)
    folder = f"{shared_dir}/checkpoint"
    unbroken = train(flags, f"--save {folder} --save-interval 5")
    resumed = train(flags, f"--load {folder} --ckpt-step 5")
    assert resumed.losses == unbroken.losses[5:]
    edited = use(shared_dir / "edited.yaml", TABLE + GATES)
    with pytest.raises(ValueError, match=r"--llr-role-table is \[\[.*but the checkpoint was saved"):
        train(edited, f"--load {folder} --ckpt-step 5")


def test_an_optimizer_that_cannot_freeze_a_part_says_so(shared_dir: Path) -> None:
    flags = use(shared_dir / "t.yaml", GATES)
    with pytest.raises(ValueError, match=r"block\.0\.mlp\.gate has multiplier 0, but shares"):
        train(flags, "--optimizer muon")
