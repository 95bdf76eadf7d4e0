"""A folder whose index, files and config.json contradict each other."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megatron_llr.tools.convert import cli
from megatron_llr.tools.convert.hugging_face import SafetensorsFolder
from tests.unit.conversion import tensors

HEAD, NORM = "lm_head.weight", "model.norm.weight"


@pytest.fixture
def folder(models: Path, tmp_path: Path) -> Path:
    """Two shards, `a` with all tensors but the final norm and `b` with that, and their index."""
    hf = tmp_path / "hf"
    hf.mkdir()
    shutil.copyfile(models / "llama" / "config.json", hf / "config.json")
    held = tensors(models / "llama")
    save_file({NORM: held.pop(NORM)}, hf / "b.safetensors", metadata={"format": "pt"})
    save_file(held, hf / "a.safetensors", metadata={"format": "pt"})
    write_index(hf, {**dict.fromkeys(held, "a.safetensors"), NORM: "b.safetensors"})
    return hf


def write_index(hf: Path, places: dict[str, str]) -> None:
    document = {"metadata": {}, "weight_map": places}
    (hf / "model.safetensors.index.json").write_text(json.dumps(document))


def add_to(path: Path, **values: torch.Tensor) -> None:
    save_file({**load_file(path), **values}, path, metadata={"format": "pt"})


def place(hf: Path, **changes: str | None) -> None:
    path = hf / "model.safetensors.index.json"
    places = json.loads(path.read_text())["weight_map"] | changes
    write_index(hf, {name: file for name, file in places.items() if file is not None})


def test_the_index_decides_between_two_shards(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever the order of the files' names; the output says what was not read."""
    right = load_file(folder / "a.safetensors")[HEAD]
    add_to(folder / "b.safetensors", **{HEAD: torch.zeros_like(right)})
    reader = SafetensorsFolder(folder)
    assert torch.equal(reader.read(HEAD), right)
    assert cli.main([str(folder), str(tmp_path / "out")]) == 0
    assert f"not read in b.safetensors: {HEAD}, by the index" in capsys.readouterr().out


def test_files_that_the_index_does_not_name_are_not_read(folder: Path, tmp_path: Path) -> None:
    """As in transformers; Mistral's folders have a consolidated.safetensors."""
    (folder / "consolidated.safetensors").write_bytes(b"not even a safetensors file")
    assert cli.main([str(folder), str(tmp_path / "out")]) == 0


def test_a_single_file_takes_precedence_over_an_index(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in transformers, of which this reads the same tensors; the output says so."""
    other = {name: tensor + 1 for name, tensor in tensors(folder).items()}
    save_file(other, folder / "model.safetensors", metadata={"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(folder)
    read = SafetensorsFolder(folder).read(HEAD)
    assert torch.equal(read, other[HEAD])
    assert torch.equal(read, model.lm_head.weight)
    assert cli.main([str(folder), str(tmp_path / "out")]) == 0
    assert "not read: model.safetensors.index.json" in capsys.readouterr().out


CONTRADICTIONS: dict[str, tuple[Callable[[Path], object], str]] = {
    "another file": (
        lambda f: place(f, **{HEAD: "b.safetensors"}),
        f"places {HEAD} in b.safetensors, but it is in a.safetensors",
    ),
    "no file has it": (
        lambda f: place(f, **{"model.extra": "a.safetensors"}),
        "places model.extra in a.safetensors, but no file has it",
    ),
    "a missing file": (
        lambda f: place(f, **{HEAD: "c.safetensors"}),
        "Cannot read .*c.safetensors",
    ),
    "not in the index": (
        lambda f: place(f, **{HEAD: None}),
        f"a.safetensors has tensors that the index does not list: {HEAD}",
    ),
    "a stale single file": (
        lambda f: save_file({NORM: torch.ones(128)}, f / "model.safetensors"),
        "has only 1 tensors",
    ),
    "an adapter": (lambda f: (f / "adapter_config.json").write_text("{}"), "has an adapter"),
    "other weights": (
        lambda f: (f / "config.json").write_text(
            json.dumps(
                json.loads((f / "config.json").read_text()) | {"transformers_weights": "a.bin"}
            )
        ),
        "has transformers_weights = 'a.bin'",
    ),
    "an empty index": (lambda f: write_index(f, {}), "it has no weight_map"),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_a_contradiction_is_refused(
    case: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, expected = CONTRADICTIONS[case]
    change(folder)
    assert cli.main([str(folder), str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("megatron_llr: ")
    assert re.search(expected, error), error
    assert not (tmp_path / "out").exists()
