"""The same seed: the same initial weights and the same data, whatever the policy and the layout."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import Run, train

from megatron_llr.megatron import batches

LAYOUTS = {
    1: ["", "--global-batch-size 2 --micro-batch-size 2"],
    2: [
        "",
        "--tensor-model-parallel-size 2",
        "--pipeline-model-parallel-size 2",
        "--use-distributed-optimizer --bf16",
    ],
}
# Dropout is drawn per rank; the padding of the vocabulary, part of the loss, follows the layout.
START = "--train-iters 3 --lr-warmup-iters 1 --llr-same-start --vocab-size 256 "
START += "--attention-dropout 0 --hidden-dropout 0"
POLICIES = ["esd", "uniform", "random", "depth-cosine", "alphadecay"]


def start_of(*flags: str) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Whole initial weights, and the losses of the run."""
    kept: dict[str, torch.Tensor] = {}

    def keep(run: Run) -> None:
        kept.update(run.whole_weights(256))

    run = train(START, *flags, on_built=keep)
    return kept, run.losses


@pytest.mark.world_size(1, 2)
def test_weights_and_data_are_those_of_the_seed_on_every_layout() -> None:
    found = [start_of(layout) for layout in LAYOUTS[dist.get_world_size()]]
    (weights, losses), others = found[0], found[1:]
    assert len(weights) == 4 * 7 + 2
    assert weights["embedding"].shape == (256, 128)
    assert float(weights["block.0.mlp.down"].std()) == pytest.approx(0.02 / 8**0.5, rel=0.02)
    for other, other_losses in others:
        for matrix, weight in weights.items():
            same = torch.equal(other[matrix], weight)
            # bf16 keeps 8 bits of the same draw.
            assert same or torch.equal(other[matrix], weight.bfloat16().float()), matrix
        assert other_losses[0] == pytest.approx(losses[0], rel=1e-3)
    different, _ = start_of("--seed 77")
    assert not torch.equal(different["block.0.mlp.up"], weights["block.0.mlp.up"])


@pytest.mark.world_size(1)
def test_every_policy_begins_at_the_same_loss() -> None:
    """The base rate of update 1 is 0, so the loss of update 2 shows the second batch untouched."""
    losses = [start_of(f"--llr-policy {policy}")[1] for policy in POLICIES]
    assert all(found[:2] == losses[0][:2] for found in losses)
    assert losses[0][0] != losses[0][1]
    assert losses[0][2] != losses[1][2]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Tokens of every sample that --llr-fixed-validation gives, as they are asked for."""
    found: list[tuple[int, ...]] = []
    inner = batches.RepeatedDataset.__getitem__

    def recorded(self: batches.RepeatedDataset, index: int) -> Any:
        sample = inner(self, index)
        found.append(tuple(sample["tokens"].tolist()))
        return sample

    monkeypatch.setattr(batches.RepeatedDataset, "__getitem__", recorded)
    return found


@pytest.mark.world_size(1)
def test_every_evaluation_is_on_the_same_tokens_whatever_the_seed(
    seen: list[tuple[int, ...]],
) -> None:
    by_seed = []
    for seed in (1, 2):
        seen.clear()
        train(f"--llr-fixed-validation --seed {seed} --eval-iters 3 --eval-interval 4")
        # Evaluations after updates 4 and 8 and at the end, each of 3 batches of 2.
        assert len(seen) == 3 * 6
        assert seen[:6] == seen[6:12] == seen[12:]
        assert len(set(seen)) == 6
        by_seed.append(list(seen))
    assert by_seed[0] == by_seed[1]


@pytest.mark.world_size(1)
def test_a_resumed_run_may_evaluate_less_often_on_fewer_samples_or_not_at_all(
    shared_dir: Path, seen: list[tuple[int, ...]]
) -> None:
    resume = f"--llr-fixed-validation --load {shared_dir}"
    saving = f"--save {shared_dir} --save-interval 5 --exit-interval 5"
    train("--llr-fixed-validation --eval-iters 3 --eval-interval 1", saving)
    first = seen[:6]
    seen.clear()
    train(resume, "--eval-iters 3 --eval-interval 8")
    assert seen == first * 2
    seen.clear()
    train(resume, "--eval-iters 2 --eval-interval 2")
    assert len(seen) == 3 * 4
    assert set(seen[:4]) == set(seen[4:8]) == set(seen[8:])
    seen.clear()
    train(resume, "--eval-iters 0")
    assert not seen


@pytest.mark.world_size(1, 2)
@pytest.mark.parametrize("fixed", ["", "--llr-fixed-validation"])
def test_evaluations_have_a_micro_batch_size_of_their_own(
    fixed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: dict[bool, set[torch.Size]] = {True: set(), False: set()}
    inner = batches._next_batch

    def recorded(*args: Any) -> batches.Batch:
        batch = inner(*args)
        assert batch["tokens"] is not None
        taken[torch.is_grad_enabled()].add(batch["tokens"].shape)
        return batch

    monkeypatch.setattr(batches, "_next_batch", recorded)
    train(
        f"--tensor-model-parallel-size {dist.get_world_size()} --eval-micro-batch-size 2",
        f"--eval-iters 2 --eval-interval 4 {fixed}",
    )
    assert taken == {True: {(1, 16)}, False: {(2, 16)}}
