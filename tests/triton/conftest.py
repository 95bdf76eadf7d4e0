"""Kernels on a GPU if there is one, otherwise in triton's interpreter (`TRITON_INTERPRET=1`)."""

import os

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Triton reads the variable at import: tests/unit/test_triton.py starts a process with it set.
if DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of two blocks, so that small tensors have several."""
    from megatron_llr.param_groups import adam_kernel

    monkeypatch.setattr(adam_kernel, "CHUNK", 2048)


@pytest.fixture
def device() -> str:
    return DEVICE
