"""Settings that all tests share."""

import os
from pathlib import Path

import pytest
from hypothesis import settings

EXAMPLES = os.environ.get("LLR_EXAMPLES")
# The same examples in every run, so that a change answers for its own faults; LLR_EXAMPLES=N looks
# further, at random. Shared machines are noisy: no example may fail for being slow.
settings.register_profile(
    "project", deadline=None, max_examples=int(EXAMPLES or 60), derandomize=EXAMPLES is None
)
settings.load_profile("project")


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder of the official code's figures, from LLR_GOLDEN_DIR."""
    folder = os.environ.get("LLR_GOLDEN_DIR", "")
    if not folder or not (Path(folder) / "spectra.json").exists():
        pytest.skip("LLR_GOLDEN_DIR names no folder with spectra.json")
    return Path(folder)
