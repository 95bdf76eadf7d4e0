"""Invalid input or output of a conversion: a one-line error, and no output left."""

import json
import os
import re
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_llr.tools.convert import cli, settings
from megatron_llr.tools.convert.links import links_of
from megatron_llr.tools.convert.options import HUGGING_FACE, Options
from megatron_llr.tools.convert.read_torch_dist import iteration_folder
from megatron_llr.tools.convert.to_hugging_face import to_hugging_face
from megatron_llr.tools.convert.to_megatron import to_megatron
from megatron_llr.tools.convert.write_torch_dist import SavedTensor, write_torch_dist
from tests.unit.conversion import ROOT, limited, tensors


@pytest.fixture
def llama(models: Path, tmp_path: Path) -> Path:
    """A copy of the LLaMA that a test may spoil."""
    return Path(shutil.copytree(models / "llama", tmp_path / "llama"))


def spoil_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def spoil_tensor(folder: Path, name: str, tensor: torch.Tensor | None) -> None:
    """Change or drop a tensor, in a folder that is rewritten as one file."""
    held = tensors(folder)
    for file in folder.glob("model*safetensors*"):
        file.unlink()
    held.pop(name, None)
    if tensor is not None:
        held[name] = tensor
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 100)


BAD_MODELS = {
    "truncated": (lambda f: truncate(sorted(f.glob("*.safetensors"))[1]), "Cannot read .*00002"),
    "no-shard": (lambda f: sorted(f.glob("*.safetensors"))[1].unlink(), "Cannot read .*00002"),
    "no-weights": (
        lambda f: [p.unlink() for p in f.glob("model*")],
        "no weights in .* must have model.safetensors",
    ),
    "no-tensor": (lambda f: spoil_tensor(f, "model.norm.weight", None), "has no model.norm.weight"),
    "shape": (
        lambda f: spoil_tensor(f, "model.norm.weight", torch.ones(64)),
        r"model.norm.weight has shape \[64\]. By config.json it must be \[128\]",
    ),
    "tied": (
        lambda f: spoil_config(f, tie_word_embeddings=True),
        "ties lm_head.weight to .*embed_tokens.weight, .*set tie_word_embeddings to false in conf",
    ),
    "extra": (
        lambda f: spoil_tensor(f, "model.layers.0.mlp.router.weight", torch.ones(2, 2)),
        "tensors that the llama table does not list: model.layers.0.mlp.router.weight",
    ),
    "quantised": (
        lambda f: spoil_tensor(f, "model.norm.weight", torch.ones(128, dtype=torch.int8)),
        "model.norm.weight is stored as I8, .* must be one of F64, F32, F16, BF16",
    ),
    "mixed": (
        lambda f: spoil_tensor(
            f, "model.layers.2.mlp.down_proj.weight", torch.ones(128, 192).bfloat16()
        ),
        "dtypes float32 and bfloat16.*must have one dtype.*--dtype",
    ),
    "family": (
        lambda f: spoil_config(f, model_type="gpt2"),
        "model_type 'gpt2' cannot be converted. Supported are llama, mistral, qwen2, qwen3",
    ),
    "config": (
        lambda f: (f / "config.json").write_text("{"),
        "Cannot read .*config.json.*must be a JSON object",
    ),
    "activation": (
        lambda f: spoil_config(f, hidden_act="gelu"),
        "hidden_act = 'gelu'.*must be hidden_act = 'silu'",
    ),
    "bias": (
        lambda f: spoil_config(f, attention_bias=True),
        "attention_bias = True.*must be attention_bias = False",
    ),
    "rope": (
        lambda f: spoil_config(
            f, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
        ),
        "scales its rotary frequencies with .*linear.* supports .*llama3",
    ),
    "layers": (lambda f: spoil_config(f, num_hidden_layers=5), "has no model.layers.4"),
}


@pytest.mark.parametrize("spoil", BAD_MODELS)
def test_a_bad_hugging_face_folder_is_refused(
    spoil: str, llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line that describes the problem, exit code 1, and no output."""
    change, expected = BAD_MODELS[spoil]
    change(llama)
    assert cli.main([str(llama), str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("megatron_llr: ")
    assert re.search(expected, error), error
    assert [path.name for path in tmp_path.iterdir()] == ["llama"]


def piece_file(folder: Path) -> Path:
    return next((folder / "release").glob("*.distcp"))


BAD_CHECKPOINTS = {
    "truncated": (lambda f: truncate(piece_file(f)), "is truncated to"),
    "no-file": (lambda f: piece_file(f).unlink(), "is missing"),
    "no-index": (lambda f: (f / "release/.metadata").unlink(), "Cannot read the index"),
    "broken-index": (lambda f: truncate(f / "release/.metadata"), "Cannot read the index"),
    "unfinished": (
        lambda f: (f / "release/metadata.json").unlink(),
        "no complete torch_dist checkpoint in",
    ),
    "other-format": (
        lambda f: (f / "release/metadata.json").write_text('{"sharded_backend": "zarr"}'),
        "the format zarr. It must be saved with --ckpt-format torch_dist",
    ),
    "broken-backend": (
        lambda f: (f / "release/metadata.json").write_text('{"sharded_ba'),
        "release/metadata.json: Unterminated string",
    ),
    "broken-tracker": (
        lambda f: (f / "latest_checkpointed_iteration.txt").write_text(""),
        "latest_checkpointed_iteration.txt contains ''. It must contain the number of an iteration",
    ),
    "no-tracker": (lambda f: (f / "latest_checkpointed_iteration.txt").unlink(), "iter_0000000"),
    "config": (
        lambda f: spoil_config(f / HUGGING_FACE, num_attention_heads=8, head_dim=16),
        "contradicts the checkpoint: it has heads 8, but the checkpoint has 4",
    ),
    "damaged": (
        lambda f: piece_file(f).write_bytes(bytes(piece_file(f).stat().st_size)),
        "Cannot read the settings saved in",
    ),
}


@pytest.mark.parametrize("spoil", BAD_CHECKPOINTS)
def test_a_bad_megatron_checkpoint_is_refused(
    spoil: str, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, expected = BAD_CHECKPOINTS[spoil]
    to_megatron(models / "llama", tmp_path / "megatron", Options())
    change(tmp_path / "megatron")
    assert cli.main([str(tmp_path / "megatron"), str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert expected in error, error
    assert [path.name for path in tmp_path.iterdir()] == ["megatron"]


def test_an_iteration_that_is_not_the_folders_own_is_refused(tmp_path: Path) -> None:
    for name in ("iter_0000002", "release"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    folder = tmp_path / "iter_0000002"
    assert iteration_folder(tmp_path, "2") == folder
    assert iteration_folder(folder) == iteration_folder(folder, "2") == folder
    assert iteration_folder(tmp_path / "release", "release") == tmp_path / "release"
    for other in ("4", "release"):
        with pytest.raises(ValueError, match=f"not that of --iteration {other}. Omit --iteration"):
            iteration_folder(folder, other)


def test_a_checkpoint_of_another_kind_of_model_is_refused(models: Path, tmp_path: Path) -> None:
    """Weights that no table lists raise an error instead of being dropped."""
    family, model = settings.from_config(models / "llama" / "config.json")
    saved = [
        SavedTensor(link.key, link.layer, link.shape, model.layers, torch.float32)
        for link in links_of(family, model, 250)
    ]
    extra = "decoder.layers.mlp.router.weight"
    saved += [
        SavedTensor(extra, layer, (8, 128), model.layers, torch.float32) for layer in range(4)
    ]
    folder = tmp_path / "iter_0000007"
    folder.mkdir()
    common = {"args": Namespace(**settings.to_args(model, 250))}
    write_torch_dist(
        folder,
        saved,
        lambda entry: torch.zeros(entry.shape),
        {"common_state/shard_0_1": common},
    )
    with pytest.raises(ValueError, match=f"no table lists: {extra}"):
        to_hugging_face(tmp_path, tmp_path / "out", Options(iteration="7"))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("multi_latent_attention", True),
        ("softmax_type", "off-by-one"),
        ("use_mup", True),
        ("activation_func_clamp_value", 0.1),
        ("glu_linear_offset", 1.0),
    ],
)
def test_settings_that_make_another_function_are_refused(
    name: str, value: object, models: Path
) -> None:
    """Also those that add no tensor; args from before a setting existed pass."""
    _, model = settings.from_config(models / "llama" / "config.json")
    args = Namespace(**settings.to_args(model, 250))
    vars(args).pop(name, None)
    assert settings.from_args(args, 250) == model
    setattr(args, name, value)
    with pytest.raises(ValueError, match=f"{name} = {value!r}"):
        settings.from_args(args, 250)


def test_an_existing_output_is_refused_and_kept(models: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "precious").touch()
    assert cli.main([str(models / "llama"), str(target)]) == 1
    assert [path.name for path in target.iterdir()] == ["precious"]
    assert cli.main([str(models / "nowhere"), str(tmp_path / "other")]) == 1


STOPPED = """
import os, signal, sys
from megatron_llr.tools.convert import cli
from megatron_llr.tools.convert.hugging_face import SafetensorsFolder
from megatron_llr.tools.convert.read_torch_dist import TorchDistReader
from megatron_llr.tools.entry_point import run_tool

calls = 0

def stopping(read):
    def stop(*arguments):
        global calls
        calls += 1
        if calls == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return read(*arguments)
    return stop

for reader in (SafetensorsFolder, TorchDistReader):
    reader.read = stopping(reader.read)
sys.exit(run_tool(lambda: cli.main(sys.argv[1:])))
"""


def test_a_signal_during_a_conversion_leaves_nothing(models: Path, tmp_path: Path) -> None:
    """Raised inside PyTorch's checkpoint writer, and between two output files."""
    to_megatron(models / "llama", tmp_path / "megatron", Options())
    for source in (models / "llama", tmp_path / "megatron"):
        command = [sys.executable, "-W", "ignore", "-c", STOPPED, source, tmp_path / "out"]
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800)
        assert run.returncode == 143, run.stderr
        assert "Traceback" not in run.stderr
        assert "stopped by SIGTERM" in run.stderr
        assert [path.name for path in tmp_path.iterdir()] == ["megatron"]


def test_a_full_disk_leaves_nothing(models: Path, tmp_path: Path) -> None:
    """Writing fails midway, in both directions."""
    to_megatron(models / "llama", tmp_path / "megatron", Options())
    for source in (models / "llama", tmp_path / "megatron"):
        run = limited("file", 1_000_000, source, tmp_path / "out")
        assert run.returncode == 1, run.stderr
        assert "Cannot write in" in run.stderr
        assert "The partial output was removed" in run.stderr
        assert [path.name for path in tmp_path.iterdir()] == ["megatron"]
