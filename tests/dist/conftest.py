"""Multi-rank tests: pytest under torchrun, one launch per world size."""

import os
import tempfile
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

WORLD_SIZE = int(os.environ.get("WORLD_SIZE", "1"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave out the tests of other world sizes: `@pytest.mark.world_size(2, 4)`."""
    for item in items:
        marker = item.get_closest_marker("world_size")
        if marker is not None and WORLD_SIZE not in marker.args:
            item.add_marker(pytest.mark.skip(reason=f"needs world size {marker.args}"))


@pytest.fixture(scope="session", autouse=True)
def _process_group() -> Iterator[None]:
    import harness  # noqa: F401  (the CPU substitutions come before everything)

    if "RANK" not in os.environ:
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
        os.environ.setdefault("MASTER_ADDR", "localhost")
        os.environ.setdefault("MASTER_PORT", "29511")
    # A test that would hang ends with an error instead.
    dist.init_process_group("gloo", timeout=timedelta(seconds=600))
    yield
    dist.destroy_process_group()


@pytest.fixture
def shared_dir(request: pytest.FixtureRequest) -> Iterator[Path]:
    """One temporary folder, the same on every rank, gone after the test."""
    made: list[str | None] = [None]
    folder = tempfile.TemporaryDirectory() if dist.get_rank() == 0 else None
    if folder is not None:
        made[0] = folder.name
    dist.broadcast_object_list(made, src=0)
    assert made[0] is not None
    yield Path(made[0])
    dist.barrier()
    if folder is not None:
        folder.cleanup()
