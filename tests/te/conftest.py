"""Tests with Transformer Engine's real classes, on CPU: `make test-te`, one process."""

from tests.dist.conftest import _process_group, shared_dir  # noqa: F401
