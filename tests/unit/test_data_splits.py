"""The split that tools/preprocess_data.py suggests has documents for training and validation."""

from megatron_llr.megatron import launch

launch.prepare_device(["--llr-device", "cpu"])

from megatron_llr.megatron.data_splits import (  # noqa: E402
    default_split_leaves_empty,
    documents_in,
    split_bounds,
    suggested_split,
)


def test_the_suggested_split_has_no_empty_part() -> None:
    for documents in range(2, 1000):
        value = suggested_split(documents).removeprefix("--split ")
        ranges = [documents_in(bounds, documents) for bounds in split_bounds(value)]
        assert 0 == ranges[0][0] < ranges[0][1] == ranges[1][0] < ranges[1][1] == documents
    assert suggested_split(1) == "--split 1,0,0 --eval-iters 0"


def test_few_documents_leave_megatrons_default_split_empty() -> None:
    assert default_split_leaves_empty(1) == ["validation", "test"]
    assert default_split_leaves_empty(100) == ["test"]
    assert default_split_leaves_empty(501) == []
