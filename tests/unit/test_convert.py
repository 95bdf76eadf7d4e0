"""The converter without ranks: bitwise round trips, and every way in which an input can be bad."""

import json
import resource
import shutil
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from megatron_llr.tools.convert import cli, settings
from megatron_llr.tools.convert.architecture import Architecture
from megatron_llr.tools.convert.links import links_of
from megatron_llr.tools.convert.model_families import FAMILIES, family_for
from megatron_llr.tools.convert.options import FLAGS, HUGGING_FACE, Options
from megatron_llr.tools.convert.read_torch_dist import TorchDistReader
from megatron_llr.tools.convert.to_hugging_face import to_hugging_face
from megatron_llr.tools.convert.to_megatron import to_megatron
from megatron_llr.tools.convert.write_torch_dist import SavedTensor, write_torch_dist
from tests.reference import families
from tests.unit.conversion import limited, tensors

ROOT = Path(__file__).resolve().parents[2]


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


def test_one_file_comes_before_an_old_index_and_folders_are_not_carried(
    models: Path, tmp_path: Path
) -> None:
    """As transformers reads such a folder."""
    hf = Path(shutil.copytree(models / "llama", tmp_path / "hf"))
    newer = {name: tensor + 1 for name, tensor in tensors(hf).items()}
    save_file(newer, hf / "model.safetensors")
    (hf / "tokenizer.d").mkdir()
    to_megatron(hf, tmp_path / "megatron", Options())
    to_hugging_face(tmp_path / "megatron", tmp_path / "back", Options())
    after = tensors(tmp_path / "back")
    assert all(torch.equal(after[name], newer[name]) for name in newer)


def test_a_tied_model_may_repeat_its_embedding_as_a_head(models: Path, tmp_path: Path) -> None:
    hf = Path(shutil.copytree(models / "qwen2", tmp_path / "hf"))
    held = tensors(hf)
    repeated = {**held, "lm_head.weight": held["model.embed_tokens.weight"].clone()}
    save_file(repeated, hf / "model.safetensors")
    to_megatron(hf, tmp_path / "megatron", Options())
    to_hugging_face(tmp_path / "megatron", tmp_path / "back", Options())
    assert tensors(tmp_path / "back").keys() == held.keys()


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


def test_a_config_changes_only_where_it_names_another_dtype(models: Path, tmp_path: Path) -> None:
    there = tmp_path / "megatron"
    to_megatron(models / "llama", there, Options())
    config = there / HUGGING_FACE / "config.json"
    held = json.loads(config.read_text())
    del held["dtype"]
    for number, dtype in enumerate([{}, {"torch_dtype": None}, {"torch_dtype": "float32"}]):
        text = json.dumps({**held, **dtype}, indent=4).replace("\n", "\r\n").encode()
        config.write_bytes(text)
        to_hugging_face(there, tmp_path / str(number), Options())
        assert (tmp_path / str(number) / "config.json").read_bytes() == text
    to_hugging_face(there, tmp_path / "half", Options(dtype=torch.float16))
    made = json.loads((tmp_path / "half" / "config.json").read_text())
    assert made == {**held, "torch_dtype": "float16"}


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


@pytest.mark.parametrize("rows", [200, 288])
def test_chosen_rows_of_the_vocabulary_reach_the_config(
    rows: int, models: Path, tmp_path: Path
) -> None:
    """Also where the config carried over says otherwise: the tokenizer stays with it."""
    there, back = tmp_path / "megatron", tmp_path / "back"
    to_megatron(models / "qwen2", there, Options(vocab_multiple=96))
    to_hugging_face(there, back, Options(vocab_size=rows, files=there / HUGGING_FACE))
    held = json.loads((there / HUGGING_FACE / "config.json").read_text())
    assert json.loads((back / "config.json").read_text()) == {**held, "vocab_size": rows}
    assert tensors(back)["model.embed_tokens.weight"].shape == (rows, 128)
    assert (back / "tokenizer.json").exists()


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
    """Megatron's own parser makes of the flags the model that the checkpoint's args describe."""
    from megatron.training.arguments import add_megatron_arguments

    parser = add_megatron_arguments(ArgumentParser(allow_abbrev=False))
    for name in families.BUILDERS:
        family, model = settings.from_config(models / name / "config.json")
        args = Namespace(**settings.to_args(model, 256))
        assert settings.from_args(args, 250) == model
        assert family_for(model) == family
        to_megatron(models / name, tmp_path / name, Options())
        flags = (tmp_path / name / FLAGS).read_text().split()
        assert flags == [word for flag in settings.to_flags(model, 256) for word in flag.split()]
        parsed = parser.parse_args(flags)
        assert settings.from_args(parsed, 250) == model
        assert parsed.padded_vocab_size == 256


def test_layers_stored_one_by_one_are_read_too(tmp_path: Path) -> None:
    """Megatron stacks layers, unless they differ (`non_homogeneous_layers`)."""
    layers = [torch.randn(3, 5) for _ in range(4)]
    keys = [f"decoder.layers.{layer}.mlp.linear_fc2.weight" for layer in range(4)]
    single = [SavedTensor(key, None, (3, 5), 4, torch.float32) for key in keys]
    stacked = [
        SavedTensor("decoder.layers.mlp.linear_fc2.weight", layer, (3, 5), 4, torch.float32)
        for layer in range(4)
    ]
    for name, saved in (("single", single), ("stacked", stacked)):
        (tmp_path / name).mkdir()
        order = iter(layers)
        write_torch_dist(tmp_path / name, saved, lambda entry, order=order: next(order), {})
        reader = TorchDistReader(tmp_path / name)
        for layer, expected in enumerate(layers):
            tensor = reader.read("decoder.layers.mlp.linear_fc2.weight", layer)
            assert torch.equal(tensor, expected)


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
        cli.main(["--help"])
    text = capsys.readouterr().out
    assert len(text.splitlines()) <= 40
    assert "example:" in text
    assert resource.getrlimit(resource.RLIMIT_DATA)[0] == resource.RLIM_INFINITY


PLAIN = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
OTHER = (
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int64,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.complex64,
)


@pytest.mark.parametrize("dtype", [*PLAIN, *OTHER], ids=str)
def test_every_stored_dtype_is_kept_or_refused(
    dtype: torch.dtype, models: Path, tmp_path: Path
) -> None:
    """All plain floating point bitwise in both directions; nothing else is reinterpreted."""
    hf = tmp_path / "hf"
    hf.mkdir()
    shutil.copyfile(models / "qwen2" / "config.json", hf / "config.json")
    held = {name: tensor.to(dtype) for name, tensor in tensors(models / "qwen2").items()}
    save_file(held, hf / "model.safetensors", metadata={"format": "pt"})
    if dtype in OTHER:
        with pytest.raises(ValueError, match=r"is stored as .* must be one of F64, F32, F16, BF16"):
            to_megatron(hf, tmp_path / "megatron", Options())
        assert not (tmp_path / "megatron").exists()
        return
    to_megatron(hf, tmp_path / "megatron", Options())
    to_hugging_face(tmp_path / "megatron", tmp_path / "back", Options())
    after = tensors(tmp_path / "back")
    assert {name: tensor.dtype for name, tensor in after.items()} == dict.fromkeys(held, dtype)
    assert all(torch.equal(after[name], held[name]) for name in held)
