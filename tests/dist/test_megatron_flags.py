"""Flags that Megatron leaves to its entry points mean here what they mean there."""

import json
from pathlib import Path
from typing import Any

import harness
import numpy as np
import pytest
import torch
from harness import train
from megatron.core.datasets.gpt_dataset import GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from megatron.core.rerun_state_machine import RerunStateMachine

from megatron_llr.megatron import batches

pytestmark = pytest.mark.world_size(1)


def write_pair(prefix: Path, documents: int) -> str:
    """A pair of random tokens, as --data-path names it."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    draw = torch.Generator().manual_seed(documents)
    for _ in range(documents):
        builder.add_document(torch.randint(0, 250, (40,), generator=draw), [40])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def test_flags_of_the_datasets_reach_them(
    shared_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[dict[str, Any]] = []
    plain = GPTDatasetConfig

    def recorded(**settings: Any) -> Any:
        told.append(settings)
        return plain(**settings)

    monkeypatch.setattr(batches, "GPTDatasetConfig", recorded)
    # Megatron takes no --split beside a set per split.
    at = harness.TRAINING.index("--split")
    monkeypatch.setattr(harness, "TRAINING", harness.TRAINING[:at] + harness.TRAINING[at + 2 :])
    monkeypatch.setattr(harness, "DATA", [word for word in harness.DATA if word != "--mock-data"])

    counts = {write_pair(shared_dir / f"text{n}", n): [n, n + 1] for n in (5, 9)}
    sequences = shared_dir / "sequences.json"
    sequences.write_text(json.dumps(counts))
    first, second = counts
    data = f"--train-data-path 0.5 {first} 0.5 {second} --valid-data-path {second} "
    data += f"--data-cache-path {shared_dir / 'cache'} --eval-iters 2 --llr-fixed-validation "
    quick = f"--dataloader-fast-cache-load --dataloader-defer-npy-index-mmap {data}"
    quick += f"--allow-ambiguous-pad-tokens --per-dataset-sequences-path {sequences}"

    usual = train(data)
    told.clear()
    assert train(quick).losses == usual.losses
    assert len(told) == 2
    for settings in told:
        assert settings["fast_cache_load"]
        assert settings["defer_npy_index_mmap"]
        assert settings["allow_ambiguous_pad_tokens"]
        assert settings["sequences_per_dataset"] == counts

    sequences.write_text("{")
    with pytest.raises(
        ValueError, match=r"--per-dataset-sequences-path .*sequences\.json cannot be read"
    ):
        train(quick)


def test_a_spiky_loss_is_looked_for_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    judged: list[tuple[float, str]] = []

    def judge(self: Any, result: torch.Tensor, threshold: float, context: str) -> bool:
        judged.append((threshold, context))
        return False

    monkeypatch.setattr(RerunStateMachine, "is_unexpectedly_large", judge)
    train("--exit-interval 2")
    assert not judged
    train("--exit-interval 2 --check-for-spiky-loss")
    # Both microbatches of update 2: Megatron judges nothing in the first.
    assert judged == [(10, "loss")] * 2
