"""What several unit tests ask for."""

from pathlib import Path

import pytest

from megatron_llr.tools.convert.options import Options
from megatron_llr.tools.convert.to_megatron import to_megatron
from tests.reference import families


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one sharded Hugging Face model of each family."""
    root = tmp_path_factory.mktemp("models")
    for family in families.BUILDERS:
        families.save(families.build(family), root / family)
        (root / family / "tokenizer.json").write_text("{}")
        (root / family / "model.safetensors.index.json.bak").write_text("not carried over")
    return root


@pytest.fixture(scope="session")
def checkpoint(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Megatron checkpoint of the tied model; copy it before changing it."""
    folder = tmp_path_factory.mktemp("checkpoint") / "megatron"
    to_megatron(models / "qwen2", folder, Options())
    return folder
