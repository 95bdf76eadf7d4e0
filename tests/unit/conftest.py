"""What several unit tests ask for."""

from pathlib import Path

import pytest

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
