"""Kernels on a GPU, or on CPU tensors with `TRITON_INTERPRET=1`."""

import os

import pytest
import torch


@pytest.fixture(scope="session")
def device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    assert os.environ.get("TRITON_INTERPRET") == "1", "no GPU: set TRITON_INTERPRET=1"
    return "cpu"
