"""Settings that all tests share."""

import os
from pathlib import Path

import pytest
from hypothesis import settings

# Shared machines are noisy: no example may fail for being slow.
settings.register_profile("project", deadline=None, max_examples=60)
settings.load_profile("project")


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder of the official code's figures, from LLR_GOLDEN_DIR."""
    folder = os.environ.get("LLR_GOLDEN_DIR", "")
    if not folder or not (Path(folder) / "spectra.json").exists():
        pytest.skip("LLR_GOLDEN_DIR names no folder with spectra.json")
    return Path(folder)
