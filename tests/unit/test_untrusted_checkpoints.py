"""An outside checkpoint cannot run a program, write outside the output, or use the network."""

import ast
import io
import json
import os
import pickle
import shutil
import socket
import zipfile
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

from megatron_llr.tools.convert import cli
from megatron_llr.tools.convert.options import HUGGING_FACE
from megatron_llr.tools.convert.restricted_pickle import FileSlice, load_archive, read_index
from tests.unit.conversion import (
    ROOT,
    edit_args,
    make_tokenizer,
    replace_part,
    saved,
    tensors,
)


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.marker,)


def plant_in_index(folder: Path, payload: Payload) -> None:
    index = pickle.loads((folder / ".metadata").read_bytes())
    index.planner_data = {"plans": [payload]}
    (folder / ".metadata").write_bytes(pickle.dumps(index))


PLACES: dict[str, Callable[[Path, Payload], object]] = {
    "the index": lambda f, p: (f / ".metadata").write_bytes(pickle.dumps(p)),
    "inside the index": plant_in_index,
    "an older index": lambda f, p: (f / ".metadata").write_bytes(pickle.dumps(p, protocol=2)),
    "common.pt": lambda f, p: torch.save({"args": Namespace(num_layers=p)}, f / "common.pt"),
    "a pickle as common.pt": lambda f, p: (f / "common.pt").write_bytes(pickle.dumps(p)),
    "an old common.pt": lambda f, p: torch.save(
        {"args": p}, f / "common.pt", _use_new_zipfile_serialization=False
    ),
    "common state": lambda f, p: replace_part(f, "common_state/shard_0_1", saved([{"args": p}])),
    "a tensor": lambda f, p: replace_part(f, "decoder.final_layernorm.weight", saved(p)),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_payload_in_a_megatron_checkpoint_is_refused(
    place: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(checkpoint, tmp_path / "in"))
    PLACES[place](folder / "release", Payload(tmp_path / "ran"))
    assert cli.main([str(folder), str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err.splitlines()
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    assert len(error) == 1, error
    assert error[0].startswith("megatron_llr: ")
    if "old" not in place and "pickle" not in place and place != "an older index":
        assert "names 'posix.mkdir', which no checkpoint needs" in error[0]


def test_pickled_hugging_face_weights_are_not_read(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nor code that a config.json or a tokenizer names."""
    folder = tmp_path / "in"
    folder.mkdir()
    config = json.loads((models / "llama" / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'ran')!r})")
    torch.save(Payload(tmp_path / "ran"), folder / "pytorch_model.bin")
    assert cli.main([str(folder), str(tmp_path / "out")]) == 1
    assert "There are no weights in" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_tokenizer_with_code_is_not_run(checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    settings = {"auto_map": {"AutoTokenizer": ["code.T", "code.T"]}, "tokenizer_class": "T"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "code.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'ran')!r})")
    command = [str(checkpoint), str(tmp_path / "out"), "--files", str(folder)]
    assert cli.main(command) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer"]


OUTSIDE = ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", "a\\b", None, ["x"]]


@pytest.mark.parametrize("name", OUTSIDE, ids=str)
def test_an_index_cannot_name_files_of_other_folders(
    name: object, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(models / "llama", tmp_path / "in"))
    save_file(tensors(folder), tmp_path / "secret.safetensors")
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.norm.weight"] = name
    path.write_text(json.dumps(index))
    assert cli.main([str(folder), str(tmp_path / "out")]) == 1
    assert "places model.norm.weight in" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["../part.distcp", "/etc/passwd", "x/y", "\0", "", 3])
def test_a_megatron_index_cannot_name_files_of_other_folders(
    name: Any, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(checkpoint, tmp_path / "in"))
    index = pickle.loads((folder / "release" / ".metadata").read_bytes())
    next(iter(index.storage_data.values())).relative_path = name
    (folder / "release" / ".metadata").write_bytes(pickle.dumps(index))
    assert cli.main([str(folder), str(tmp_path / "out")]) == 1
    assert "not in the folder" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_tensor_names_do_not_become_paths(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(models / "llama", tmp_path / "in"))
    held = tensors(folder)
    for file in folder.glob("model*"):
        file.unlink()
    save_file({**held, "../../escaped": torch.ones(2)}, folder / "model.safetensors")
    assert cli.main([str(folder), str(tmp_path / "out")]) == 1
    assert "that the llama table does not list: ../../escaped" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_no_command_uses_the_network(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a file names a model of a hub, and nothing says to be offline."""
    for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(variable, raising=False)

    attempts: list[Any] = []

    def refuse(*arguments: Any, **keywords: Any) -> None:
        attempts.append(arguments)
        raise OSError("no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    folder = Path(shutil.copytree(models / "llama", tmp_path / "in"))
    config = json.loads((folder / "config.json").read_text())
    config["_name_or_path"] = "somebody/model"
    (folder / "config.json").write_text(json.dumps(config))
    assert cli.main([str(folder), str(tmp_path / "there")]) == 0
    shutil.rmtree(tmp_path / "there" / HUGGING_FACE)
    args = {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": "somebody/model"}
    edit_args(tmp_path / "there" / "release", **args)
    assert cli.main([str(tmp_path / "there"), str(tmp_path / "back")]) == 0
    make_tokenizer(tmp_path / "tokenizer", 250)
    files = ["--files", str(tmp_path / "tokenizer")]
    assert cli.main([str(tmp_path / "there"), str(tmp_path / "with"), *files]) == 0
    assert not attempts


def test_pickles_are_read_in_one_module_only() -> None:
    """And in the converter and the examples, transformers is used without network and code."""
    sources = [
        path
        for folder in ("megatron_llr", "tools", "examples", "benchmarks")
        for path in (ROOT / folder).rglob("*.py")
        if path.name != "restricted_pickle.py"
    ]
    assert len(sources) > 100
    for path in sources:
        tree = ast.parse(path.read_text())
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
        named = {ast.unparse(call.func): call for call in calls}
        for name, call in named.items():
            assert not name.endswith(("torch.load", "Unpickler", "read_metadata")), path
            assert not name.startswith(("pickle.", "load_common")), path
            assert "allow_pickle" not in [keyword.arg for keyword in call.keywords], path
            local = path.parent.name in ("convert", "examples")
            if local and name.endswith("from_pretrained"):
                text = ast.unparse(call)
                assert "**local" in text or "local_files_only=True" in text, path


# ---- bounded memory, and no change to this process


def test_an_index_cannot_change_a_class(tmp_path: Path) -> None:
    """`BUILD` on a class would set its attributes for the whole process."""
    module = "torch.distributed.checkpoint.metadata"
    stream = f"c{module}\nMetadata\n(N}}X\x06\x00\x00\x00hiddenK\x01stb.".encode("latin-1")
    (tmp_path / ".metadata").write_bytes(b"\x80\x02" + stream)
    with pytest.raises(pickle.UnpicklingError, match="BUILD"):
        read_index(tmp_path / ".metadata")
    assert not hasattr(Metadata, "hidden")


def test_an_index_cannot_hash_nested_tuples(tmp_path: Path) -> None:
    """Two references to each level: the hash would take 2^200 steps."""
    nested: Any = ()
    for _ in range(200):
        nested = (nested, nested)
    stream = pickle.dumps(nested)[:-1]
    (tmp_path / ".metadata").write_bytes(
        b"\x80\x04}" + stream.removeprefix(b"\x80\x04") + b"K\x01s."
    )
    with pytest.raises(pickle.UnpicklingError, match="dictionary key"):
        read_index(tmp_path / ".metadata")


def test_an_archive_cannot_be_compressed(tmp_path: Path) -> None:
    """A deflated record of zeros would need a thousand times the memory of its file."""
    plain = zipfile.ZipFile(io.BytesIO(saved(torch.zeros(100_000))))
    with zipfile.ZipFile(tmp_path / "bomb", "w", zipfile.ZIP_DEFLATED) as bomb:
        for record in plain.namelist():
            bomb.writestr(record, plain.read(record))
    with (
        FileSlice(tmp_path / "bomb", 0, (tmp_path / "bomb").stat().st_size) as file,
        pytest.raises(ValueError, match="compressed"),
    ):
        load_archive(file)


def test_what_a_process_allows_stays_as_it_was(tmp_path: Path) -> None:
    """Megatron's own loader needs what it allowed; a conversion adds nothing to it."""
    (tmp_path / "common.pt").write_bytes(saved({"args": Namespace(num_layers=1)}))
    for before in ([], [Namespace]):
        with torch.serialization.safe_globals(before):
            allowed = set(torch.serialization.get_safe_globals())
            with FileSlice(
                tmp_path / "common.pt", 0, (tmp_path / "common.pt").stat().st_size
            ) as file:
                assert load_archive(file)["args"].num_layers == 1
            assert set(torch.serialization.get_safe_globals()) == allowed


@pytest.mark.parametrize("change", ["size", "length", "gap"])
def test_an_index_cannot_claim_more_than_its_files(
    change: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Petabytes are refused before they are allocated; rows that no part has are not made up."""
    folder = Path(shutil.copytree(checkpoint, tmp_path / "in"))
    index = pickle.loads((folder / "release" / ".metadata").read_bytes())
    key = "embedding.word_embeddings.weight"
    entry = index.state_dict_metadata[key]
    place = MetadataIndex(key, torch.Size((0, 0)))
    if change == "size":
        entry.size = torch.Size((2**40, 128))
        entry.chunks[0].sizes = torch.Size((2**40, 128))
    elif change == "length":
        index.storage_data[place].length = 10
    else:
        entry.chunks[0].sizes = torch.Size((100, 128))
    (folder / "release" / ".metadata").write_bytes(pickle.dumps(index))
    assert cli.main([str(folder), str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("megatron_llr: ")
    expected = {"size": "", "length": "shorter than its shape", "gap": "do not add up"}
    assert expected[change] in error
    assert not (tmp_path / "out").exists()


def test_a_pipe_is_refused_instead_of_waited_for(
    models: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hf = Path(shutil.copytree(models / "llama", tmp_path / "hf"))
    megatron = Path(shutil.copytree(checkpoint, tmp_path / "megatron"))
    file = next(hf.glob("model-*.safetensors"))
    for folder, path in ((hf, file), (megatron, megatron / "release" / ".metadata")):
        path.unlink()
        os.mkfifo(path)
        assert cli.main([str(folder), str(tmp_path / "out")]) == 1
        assert "megatron_llr: Cannot read" in capsys.readouterr().err
    (hf / "config.json").unlink()
    os.mkfifo(hf / "config.json")
    assert cli.main([str(hf), str(tmp_path / "out")]) == 1
    assert "not a regular file" in capsys.readouterr().err
