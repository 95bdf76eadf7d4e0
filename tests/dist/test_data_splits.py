"""A split that the run reads has data, or the run is refused before training: it never hangs."""

from pathlib import Path

import harness
import numpy as np
import pytest
import torch
from harness import train
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_llr.ranks import gather_objects

pytestmark = pytest.mark.world_size(1, 2)

# Sizes of the data sets: documents of 40 tokens.
SIZES = {"one": 1, "few": 10, "many": 60, "none": 0}


@pytest.fixture
def data(shared_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a data set of every size in SIZES; training reads it instead of mock data."""
    if torch.distributed.get_rank() == 0:
        for name, documents in SIZES.items():
            builder = IndexedDatasetBuilder(f"{shared_dir / name}.bin", dtype=np.uint16)
            draw = torch.Generator().manual_seed(documents)
            for _ in range(documents):
                builder.add_document(torch.randint(0, 250, (40,), generator=draw), [40])
            builder.finalize(f"{shared_dir / name}.idx")
        (shared_dir / "broken.bin").write_bytes(b"tokens")
        (shared_dir / "broken.idx").write_bytes(b"not an index, but long enough for a header")
    torch.distributed.barrier()
    monkeypatch.chdir(shared_dir)
    at = harness.TRAINING.index("--split")
    monkeypatch.setattr(harness, "TRAINING", harness.TRAINING[:at] + harness.TRAINING[at + 2 :])
    monkeypatch.setattr(harness, "DATA", [word for word in harness.DATA if word != "--mock-data"])
    return shared_dir


def layout() -> str:
    """The second rank of the pipeline also reads data."""
    return "" if torch.distributed.get_world_size() == 1 else "--pipeline-model-parallel-size 2"


EVALUATE = "--eval-iters 2 --eval-interval 4"
REFUSED = {
    f"--data-path one --split 95,5,0 {EVALUATE}": (
        "The validation split of one is empty, but --eval-iters 2 evaluates on it: --split 95,5,0 "
        "gives it none of the 1 document."
    ),
    f"--data-path few --split 999,1,0 {EVALUATE} --llr-fixed-validation": (
        "The validation split of few is empty, but --eval-iters 2 evaluates on it: --split 999,1,0 "
        "gives it none of the 10 documents."
    ),
    f"--data-path few --split 90,5,5 {EVALUATE}": "The test split of few is empty",
    f"--data-path 0.5 many 0.5 one --split 95,5,0 {EVALUATE}": "The validation split of one is",
    f"--data-path many one --split 95,5,0 {EVALUATE}": "The validation split of one is empty",
    "--data-path one --split 5,95,0": (
        "The training split of one is empty, but the run trains on it"
    ),
    f"--data-path many --split 100,0,0 {EVALUATE}": (
        "The validation split is empty with --split 100,0,0, but --eval-iters 2 evaluates on it. "
        "Give it a share of the data, for instance --split 99,1,0, or set --eval-iters 0."
    ),
    "--data-path many --split 0,100,0": "The training split is empty with --split 0,100,0",
    "--data-path none --split 99,1,0": (
        "The training split of none is empty, but the run trains on it: the data set has no tokens"
    ),
    f"--train-data-path many {EVALUATE}": (
        "The validation split has no data path, but --eval-iters 2 evaluates on it. Set "
        "--valid-data-path, or set --eval-iters 0."
    ),
    f"--train-data-path many --valid-data-path none {EVALUATE}": "The validation split of none is",
    "--train-data-path many --valid-data-path none --full-validation": (
        "The validation split of none is empty, but --full-validation evaluates on it"
    ),
    "--data-path many few --split 100,0,0 --train-iters 400": (
        "The data sets of the training split have 173 samples of 16 tokens, but the run reads 800."
    ),
    "--data-path absent --split 100,0,0": "The data set absent does not exist: absent.bin and",
    "--data-path broken --split 100,0,0": "broken.idx cannot be read as an index of Megatron",
    "--data-path many --split 0,0,0": "--split 0,0,0 is not valid",
    "--data-path many --split 90,5,3,2": "--split 90,5,3,2 is not valid",
    "": "No training data was given. Use --data-path",
}


@pytest.mark.parametrize("flags", REFUSED)
def test_a_split_without_data_is_refused_in_one_line_on_all_ranks(data: Path, flags: str) -> None:
    with pytest.raises(ValueError, match=r"^megatron_llr: ") as caught:
        train(flags, layout(), f"--data-cache-path {data / 'cache'}")
    texts = gather_objects(str(caught.value))
    assert texts[0].startswith(f"megatron_llr: {REFUSED[flags]}")
    assert set(texts) == {texts[0]}
    assert "\n" not in texts[0]


def test_train_samples_are_checked_too(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at = harness.TRAINING.index("--train-iters")
    kept = [*harness.TRAINING[:at], *harness.TRAINING[at + 2 :]]
    at = kept.index("--lr-warmup-iters")
    monkeypatch.setattr(harness, "TRAINING", [*kept[:at], *kept[at + 2 :]])
    samples = f"--train-samples 16 --data-cache-path {data / 'cache'} {layout()}"
    with pytest.raises(ValueError, match="The validation split of one is empty"):
        train(f"--data-path one --split 95,5,0 {samples} {EVALUATE}")
    assert len(train(f"--data-path one --split 95,5,0 {samples}").losses) == 8


@pytest.mark.parametrize(
    "flags",
    [
        # The remedies that the errors name.
        "--data-path one --split 95,5,0 --eval-iters 0",
        "--data-path one --split 100,0,0 --eval-iters 0 --llr-fixed-validation",
        f"--data-path many --split 99,1,0 {EVALUATE}",
        f"--data-path few --split 90,10,0 {EVALUATE} --llr-fixed-validation",
        f"--train-data-path many --valid-data-path few {EVALUATE}",
        "--data-path many one --split 95,5,0 --eval-iters 0",
        "--train-data-path many --valid-data-path none --eval-iters 0",
        f"--data-path 0.5 many 0.5 few --split 90,10,0 {EVALUATE}",
    ],
)
def test_a_run_with_data_for_what_it_reads_trains(data: Path, flags: str) -> None:
    assert len(train(flags, layout(), f"--data-cache-path {data / 'cache'}").losses) == 8
