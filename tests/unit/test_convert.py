"""The converter without ranks: bitwise round trips, and every way in which an input can be bad."""

import json
import os
import re
import resource
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from megatron_llr.convert import command, settings
from megatron_llr.convert.architecture import Architecture
from megatron_llr.convert.families import FAMILIES, family_for
from megatron_llr.convert.links import links_of
from megatron_llr.convert.options import FLAGS, HUGGING_FACE, Options
from megatron_llr.convert.read_torch_dist import TorchDistReader
from megatron_llr.convert.to_hugging_face import to_hugging_face
from megatron_llr.convert.to_megatron import to_megatron
from megatron_llr.convert.write_torch_dist import Piece, write_torch_dist
from tests.reference import families

ROOT = Path(__file__).resolve().parents[2]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one sharded Hugging Face model of each family."""
    root = tmp_path_factory.mktemp("models")
    for family in families.BUILDERS:
        families.save(families.build(family), root / family)
        (root / family / "tokenizer.json").write_text("{}")
        (root / family / "model.safetensors.index.json.bak").write_text("not carried over")
    return root


@pytest.fixture
def llama(models: Path, tmp_path: Path) -> Path:
    """A copy of the LLaMA that a test may spoil."""
    return Path(shutil.copytree(models / "llama", tmp_path / "llama"))


@pytest.mark.parametrize("family", families.BUILDERS)
@pytest.mark.parametrize("shard_size", [10**9, 300_000])
def test_there_and_back_is_bitwise(
    family: str, shard_size: int, models: Path, tmp_path: Path
) -> None:
    there, back = tmp_path / "megatron", tmp_path / "hf"
    to_megatron(models / family, there, Options())
    to_hugging_face(there, back, Options(shard_size=shard_size))
    before, after = tensors(models / family), tensors(back)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert (back / "config.json").read_bytes() == (models / family / "config.json").read_bytes()
    assert (back / "tokenizer.json").exists()
    sizes = [path.stat().st_size for path in back.glob("*.safetensors")]
    assert (len(sizes) > 1) == (shard_size == 300_000)
    assert max(sizes) < shard_size + 20_000
    if len(sizes) > 1:
        index = json.loads((back / "model.safetensors.index.json").read_text())
        assert index["weight_map"].keys() == before.keys()
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in before.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_another_dtype_rounds_every_tensor_and_config(
    dtype: torch.dtype, models: Path, tmp_path: Path
) -> None:
    to_megatron(models / "qwen3", tmp_path / "megatron", Options(dtype=dtype))
    to_hugging_face(tmp_path / "megatron", tmp_path / "kept", Options())
    to_hugging_face(tmp_path / "megatron", tmp_path / "wide", Options(dtype=torch.float32))
    kept, wide = tensors(tmp_path / "kept"), tensors(tmp_path / "wide")
    for name, tensor in tensors(models / "qwen3").items():
        assert torch.equal(kept[name], tensor.to(dtype))
        assert torch.equal(wide[name], tensor.to(dtype).float())
    assert str(dtype).endswith(json.loads((tmp_path / "kept/config.json").read_text())["dtype"])


def test_the_vocabulary_is_padded_with_zeros_and_cut_again(models: Path, tmp_path: Path) -> None:
    report = to_megatron(models / "llama", tmp_path / "megatron", Options(vocab_multiple=96))
    reader = TorchDistReader(tmp_path / "megatron" / "release")
    for key in ("embedding.word_embeddings.weight", "output_layer.weight"):
        padded = reader.read(key, None)
        assert padded.shape == (288, 128)
        assert not padded[250:].any()
        assert padded[:250].any(dim=1).all()
    assert "vocabulary padded with zeros from 250 to 288 rows" in report.notes
    to_hugging_face(tmp_path / "megatron", tmp_path / "back", Options())
    assert tensors(tmp_path / "back")["lm_head.weight"].shape == (250, 128)


def test_without_a_config_beside_it_is_made_from_megatrons_args(
    models: Path, tmp_path: Path
) -> None:
    for family in families.BUILDERS:
        there, back = tmp_path / family, tmp_path / f"{family}-hf"
        to_megatron(models / family, there, Options())
        shutil.rmtree(there / HUGGING_FACE)
        to_hugging_face(there, back, Options())
        made = settings.from_config(back / "config.json")
        assert made == settings.from_config(models / family / "config.json")
        assert json.loads((back / "config.json").read_text())["eos_token_id"] is None


def test_flags_and_args_say_the_same(models: Path, tmp_path: Path) -> None:
    """Megatron's own parser makes of the flags what the checkpoint's args hold."""
    for name in families.BUILDERS:
        family, model = settings.from_config(models / name / "config.json")
        args = Namespace(**settings.to_args(model, 256))
        assert settings.from_args(args, 250) == model
        assert family_for(model) == family
        to_megatron(models / name, tmp_path / name, Options())
        flags = (tmp_path / name / FLAGS).read_text().split()
        assert flags == [word for flag in settings.to_flags(model) for word in flag.split()]


def test_layers_stored_one_by_one_are_read_too(tmp_path: Path) -> None:
    """Megatron stacks layers, unless they differ (`non_homogeneous_layers`)."""
    layers = [torch.randn(3, 5) for _ in range(4)]
    keys = [f"decoder.layers.{layer}.mlp.linear_fc2.weight" for layer in range(4)]
    single = [Piece(key, None, (3, 5), 4, torch.float32) for key in keys]
    stacked = [
        Piece("decoder.layers.mlp.linear_fc2.weight", layer, (3, 5), 4, torch.float32)
        for layer in range(4)
    ]
    for name, pieces in (("single", single), ("stacked", stacked)):
        (tmp_path / name).mkdir()
        order = iter(layers)
        write_torch_dist(tmp_path / name, pieces, lambda piece, order=order: next(order), {})
        reader = TorchDistReader(tmp_path / name)
        for layer, expected in enumerate(layers):
            found = reader.read("decoder.layers.mlp.linear_fc2.weight", layer)
            assert torch.equal(found, expected)


@given(
    groups=st.integers(1, 4),
    queries=st.integers(1, 3),
    channels=st.integers(1, 5),
    ffn=st.integers(1, 9),
    family=st.sampled_from(FAMILIES),
)
def test_splitting_undoes_fusing(
    groups: int, queries: int, channels: int, ffn: int, family: Any
) -> None:
    """And the fused query, key and value rows are Megatron's, group after group."""
    model = Architecture(
        layers=1,
        hidden=groups * queries * channels,
        ffn=ffn,
        heads=groups * queries,
        groups=groups,
        channels=channels,
        vocab=7,
        positions=8,
        norm_epsilon=1e-5,
        rope_theta=10000.0,
        qkv_bias=family.qkv_bias,
        qk_norm=family.qk_norm,
    )
    for link in links_of(family, model, 7):
        parts = {part.name: torch.randn(part.shape) for part in link.parts}
        fused = link.fuse(parts.values(), torch.float32)
        assert tuple(fused.shape) == link.shape
        again = link.split(fused)
        assert again.keys() == parts.keys()
        assert all(torch.equal(again[name], parts[name]) for name in parts)
        if link.key.endswith("linear_qkv.weight"):
            q, k, v = (part.unflatten(0, (groups, -1)) for part in parts.values())
            assert torch.equal(fused, torch.cat([q, k, v], dim=1).flatten(0, 1))
        if link.key.endswith("linear_fc1.weight"):
            assert torch.equal(fused, torch.cat(list(parts.values())))


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
    "truncated": (lambda f: truncate(sorted(f.glob("*.safetensors"))[1]), "cannot read .*00002"),
    "no-shard": (lambda f: sorted(f.glob("*.safetensors"))[1].unlink(), "cannot read .*00002"),
    "no-weights": (lambda f: [p.unlink() for p in f.glob("model*")], "no weights in"),
    "no-tensor": (lambda f: spoil_tensor(f, "model.norm.weight", None), "no model.norm.weight"),
    "shape": (
        lambda f: spoil_tensor(f, "model.norm.weight", torch.ones(64)),
        r"model.norm.weight contradicts config.json: got \[64\]; allowed: \[128\]",
    ),
    "extra": (
        lambda f: spoil_tensor(f, "model.layers.0.mlp.router.weight", torch.ones(2, 2)),
        "tensors that the llama table does not name: got model.layers.0.mlp.router.weight",
    ),
    "quantised": (
        lambda f: spoil_tensor(f, "model.norm.weight", torch.ones(128, dtype=torch.int8)),
        "not stored as plain floating-point",
    ),
    "mixed": (
        lambda f: spoil_tensor(
            f, "model.layers.2.mlp.down_proj.weight", torch.ones(128, 192).bfloat16()
        ),
        "differ in dtype: got float32 and bfloat16.*--dtype",
    ),
    "family": (lambda f: spoil_config(f, model_type="gpt2"), "no table for this architecture"),
    "config": (lambda f: (f / "config.json").write_text("{"), "cannot read .*config.json"),
    "activation": (lambda f: spoil_config(f, hidden_act="gelu"), "hidden_act = 'gelu'"),
    "bias": (lambda f: spoil_config(f, attention_bias=True), "attention_bias = True"),
    "rope": (
        lambda f: spoil_config(
            f, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
        ),
        "scales its rotary frequencies",
    ),
    "layers": (lambda f: spoil_config(f, num_hidden_layers=5), "no model.layers.4"),
}


@pytest.mark.parametrize("spoil", BAD_MODELS)
def test_a_bad_hugging_face_folder_is_refused(
    spoil: str, llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line that names the trouble, exit code 1, and nothing left behind."""
    change, expected = BAD_MODELS[spoil]
    change(llama)
    assert command.main([str(llama), str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("megatron_llr: ")
    assert re.search(expected, error), error
    assert [path.name for path in tmp_path.iterdir()] == ["llama"]


def piece_file(folder: Path) -> Path:
    return next((folder / "release").glob("*.distcp"))


BAD_CHECKPOINTS = {
    "truncated": (lambda f: truncate(piece_file(f)), "is cut short"),
    "no-file": (lambda f: piece_file(f).unlink(), "is missing"),
    "no-index": (lambda f: (f / "release/.metadata").unlink(), "cannot read the index"),
    "broken-index": (lambda f: truncate(f / "release/.metadata"), "cannot read the index"),
    "unfinished": (lambda f: (f / "release/metadata.json").unlink(), "no Megatron checkpoint in"),
    "other-format": (
        lambda f: (f / "release/metadata.json").write_text('{"sharded_backend": "zarr"}'),
        "says zarr",
    ),
    "no-tracker": (lambda f: (f / "latest_checkpointed_iteration.txt").unlink(), "iter_0000000"),
    "config": (
        lambda f: spoil_config(f / HUGGING_FACE, num_attention_heads=8, head_dim=16),
        "contradicts the checkpoint: got heads 8 there, 4 in the checkpoint",
    ),
    "damaged": (
        lambda f: piece_file(f).write_bytes(bytes(piece_file(f).stat().st_size)),
        "cannot read the settings saved in",
    ),
}


@pytest.mark.parametrize("spoil", BAD_CHECKPOINTS)
def test_a_bad_megatron_checkpoint_is_refused(
    spoil: str, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, expected = BAD_CHECKPOINTS[spoil]
    to_megatron(models / "llama", tmp_path / "megatron", Options())
    change(tmp_path / "megatron")
    assert command.main([str(tmp_path / "megatron"), str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert expected in error, error
    assert [path.name for path in tmp_path.iterdir()] == ["megatron"]


def test_a_checkpoint_of_another_kind_of_model_is_refused(models: Path, tmp_path: Path) -> None:
    """Weights that no table names are told, not dropped."""
    family, model = settings.from_config(models / "llama" / "config.json")
    pieces = [
        Piece(link.key, link.layer, link.shape, model.layers, torch.float32)
        for link in links_of(family, model, 250)
    ]
    extra = "decoder.layers.mlp.router.weight"
    pieces += [Piece(extra, layer, (8, 128), model.layers, torch.float32) for layer in range(4)]
    folder = tmp_path / "iter_0000007"
    folder.mkdir()
    common = {"args": Namespace(**settings.to_args(model, 250))}
    write_torch_dist(
        folder,
        pieces,
        lambda piece: torch.zeros(piece.shape),
        {"common_state/shard_0_1": common},
    )
    with pytest.raises(ValueError, match=f"no table names: got {extra}"):
        to_hugging_face(tmp_path, tmp_path / "out", Options(iteration="7"))
    mla = Namespace(**{**settings.to_args(model, 250), "multi_latent_attention": True})
    with pytest.raises(ValueError, match="multi_latent_attention = True"):
        settings.from_args(mla, 250)


def test_an_existing_output_is_refused_and_kept(models: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "precious").touch()
    assert command.main([str(models / "llama"), str(target)]) == 1
    assert [path.name for path in target.iterdir()] == ["precious"]
    assert command.main([str(models / "nowhere"), str(tmp_path / "other")]) == 1


LIMITED = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from megatron_llr import host
from megatron_llr.convert import command, to_hugging_face, to_megatron
kind, limit, *arguments = sys.argv[1:]
if kind == "data":
    used = next(int(line.split()[1]) for line in open("/proc/self/status") if "VmData" in line)
    resource.setrlimit(resource.RLIMIT_DATA, (used * 1024 + int(limit),) * 2)
else:
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit),) * 2)
sys.exit(command.main(arguments))
"""


def limited(kind: str, limit: int, *arguments: object) -> "subprocess.CompletedProcess[str]":
    """Run the command under a limit on the process's memory, or on the size of files."""
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LIMITED, kind, str(limit), *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_a_full_disk_leaves_nothing(models: Path, tmp_path: Path) -> None:
    """Writing fails half-way, in both directions."""
    to_megatron(models / "llama", tmp_path / "megatron", Options())
    for source in (models / "llama", tmp_path / "megatron"):
        run = limited("file", 1_000_000, source, tmp_path / "out")
        assert run.returncode == 1, run.stderr
        assert "cannot write in" in run.stderr
        assert "nothing was left there" in run.stderr
        assert [path.name for path in tmp_path.iterdir()] == ["megatron"]


def test_memory_stays_far_below_the_model(tmp_path: Path) -> None:
    """400 MB of weights pass through a process that may take 130 MB more than its imports.

    The largest fused tensor is 6 MB and a file 30 MB; the rest is what allocators keep.
    """
    changes = {"num_hidden_layers": 24, "hidden_size": 512, "intermediate_size": 2048}
    config = {**families._SHAPE, **changes, "vocab_size": 1000, "num_attention_heads": 8}
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **config))
    families.save(model, tmp_path / "hf", "30MB")
    size = sum(path.stat().st_size for path in (tmp_path / "hf").glob("*.safetensors"))
    assert size > 350e6
    del model
    for source, target in (("hf", "megatron"), ("megatron", "back")):
        run = limited(
            "data", 130 * 10**6, tmp_path / source, tmp_path / target, "--shard-size", "30MB"
        )
        assert run.returncode == 0, run.stderr[-2000:]
    before, after = tensors(tmp_path / "hf"), tensors(tmp_path / "back")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_help_fits_one_screen(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["--help"])
    text = capsys.readouterr().out
    assert len(text.splitlines()) <= 40
    assert "example:" in text
    assert resource.getrlimit(resource.RLIMIT_DATA)[0] == resource.RLIM_INFINITY
