"""Arbitrary input files of a conversion: success or one line, in bounded time and memory.

`corpus/` has inputs that failed once or that reach a rare branch; they run first.
"""

import io
import json
import pickle
import random
import resource
import shutil
import struct
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_llr.tools.convert import cli
from tests.unit.conversion import edit_args
from tests.unit.plain_values import plain_values

CORPUS = Path(__file__).parent / "corpus" / "convert"

# The largest file of these checkpoints has 2 MB; some hundred times that is no leak, but a bound.
MEMORY = 300 * 2**20

JSON = plain_values(st.sampled_from([-1, 0, 1, 10**12, "llama", "default", "llama3", "float32"]))
SETTINGS = (
    "model_type num_hidden_layers hidden_size intermediate_size num_attention_heads head_dim "
    "num_key_value_heads max_position_embeddings rms_norm_eps vocab_size rope_theta rope_scaling "
    "rope_parameters tie_word_embeddings sliding_window use_sliding_window layer_types hidden_act "
    "attention_bias mlp_bias num_labels dtype torch_dtype quantization_config auto_map "
    "architectures transformers_weights id2label max_window_layers partial_rotary_factor"
).split()
ARGS = (
    "num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups kv_channels "
    "max_position_embeddings layernorm_epsilon rotary_base window_size use_rope_scaling "
    "rope_scaling_factor swiglu normalization vocab_size llr_vocab_size llr_eod_id tokenizer_type "
    "tokenizer_model untie_embeddings_and_output_weights special_tokens num_experts"
).split()


@contextmanager
def bounded(folder: Path) -> Iterator[Path]:
    """A new output path; afterwards, memory and left files are checked."""
    target = folder / "out"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tracemalloc.start()
    try:
        yield target
        assert tracemalloc.get_traced_memory()[1] < MEMORY
    finally:
        tracemalloc.stop()
    # Of C++ and Rust too; in kB.
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MEMORY
    shutil.rmtree(target, ignore_errors=True)
    assert not [path for path in folder.iterdir() if path.name.startswith(".out")]


def convert(source: Path) -> int:
    """Run the command; a failure is one line of ours."""
    with bounded(source.parent) as target:
        printed = io.StringIO()
        with redirect_stderr(printed), redirect_stdout(io.StringIO()):
            code = cli.main([str(source), str(target)])
        errors = printed.getvalue()
        if code == 0:
            assert (target / "release").exists() or (target / "config.json").exists()
        else:
            assert errors.startswith("megatron_llr: "), errors
            assert errors.count("\n") == 1, errors
            assert len(errors) < 2000
            assert not target.exists()
    return code


@pytest.fixture(scope="module")
def hf(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that each example changes and restores."""
    return Path(shutil.copytree(models / "llama", tmp_path_factory.mktemp("fuzz") / "hf"))


@pytest.fixture(scope="module")
def megatron(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path_factory.mktemp("fuzz") / "megatron"))


@contextmanager
def changed(path: Path, content: bytes) -> Iterator[None]:
    before = path.read_bytes()
    path.write_bytes(content)
    try:
        yield
    finally:
        path.write_bytes(before)


def of_corpus(kind: str) -> list[Path]:
    paths = sorted((CORPUS / kind).iterdir())
    assert paths
    return paths


@given(changes=st.dictionaries(st.sampled_from(SETTINGS), JSON, min_size=1, max_size=3))
def test_any_settings_of_config_json(changes: dict[str, Any], hf: Path) -> None:
    document = json.loads((hf / "config.json").read_text())
    with changed(hf / "config.json", json.dumps({**document, **changes}).encode()):
        convert(hf)


@given(document=JSON | st.binary(max_size=200))
def test_any_config_json_and_index(document: Any, hf: Path) -> None:
    content = document if isinstance(document, bytes) else json.dumps(document).encode()
    for name in ("config.json", "model.safetensors.index.json"):
        with changed(hf / name, content):
            assert convert(hf) == 1


@given(
    name=st.text(max_size=20) | st.just("lm_head.weight"),
    file=JSON | st.text(max_size=20) | st.just("model-00001-of-00006.safetensors"),
)
def test_any_entry_of_an_index(name: str, file: Any, hf: Path) -> None:
    path = hf / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][name] = file
    with changed(path, json.dumps(index).encode()):
        convert(hf)


@given(
    header=st.dictionaries(
        st.sampled_from(["model.norm.weight", "x", "__metadata__"]),
        JSON
        | st.fixed_dictionaries(
            {
                "dtype": st.sampled_from(["F32", "BF16", "I8", "F8_E4M3", "?"]),
                "shape": st.lists(st.integers(0, 2**62), max_size=3),
                "data_offsets": st.lists(st.integers(0, 2**62), min_size=2, max_size=2),
            }
        ),
    ),
    length=st.none() | st.integers(0, 2**64 - 1),
)
def test_any_header_of_safetensors(
    header: dict[str, Any],
    length: int | None,
    hf: Path,
) -> None:
    text = json.dumps(header).encode()
    content = struct.pack("<Q", len(text) if length is None else length) + text + bytes(512)
    with changed(next(hf.glob("model-00001-*.safetensors")), content):
        assert convert(hf) == 1


def mutated(content: bytes, seed: int) -> bytes:
    """Some bytes replaced, a run of bytes doubled, or the end missing."""
    choose = random.Random(seed)
    data = bytearray(content)
    for _ in range(choose.randint(1, 4)):
        data[choose.randrange(len(data))] = choose.randrange(256)
    if choose.random() < 0.3:
        start = choose.randrange(len(data))
        data[start:start] = data[start : start + choose.randint(1, 50)]
    if choose.random() < 0.3:
        del data[choose.randrange(len(data)) :]
    return bytes(data)


@given(seed=st.integers(0, 2**32))
def test_any_bytes_of_a_megatron_index(seed: int, megatron: Path) -> None:
    path = megatron / "release" / ".metadata"
    with changed(path, mutated(path.read_bytes(), seed)):
        convert(megatron)


@given(seed=st.integers(0, 2**32))
def test_any_bytes_of_the_parts(seed: int, megatron: Path) -> None:
    """The settings come first in the file; a changed weight is not noticed."""
    path = next((megatron / "release").glob("*.distcp"))
    content = path.read_bytes()
    with changed(path, mutated(content[:3000], seed) + content[3000:]):
        convert(megatron)


@given(
    changes=st.dictionaries(
        st.sampled_from(ARGS), JSON | st.tuples(JSON, JSON), min_size=1, max_size=3
    )
)
def test_any_args_of_megatron(changes: dict[str, Any], megatron: Path) -> None:
    path = megatron / "release" / ".metadata"
    with changed(path, path.read_bytes()):
        edit_args(megatron / "release", **changes)
        convert(megatron)


@given(
    attribute=st.sampled_from(["state_dict_metadata", "storage_data", "planner_data", "version"]),
    value=JSON,
    key=st.sampled_from(["embedding.word_embeddings.weight", "common_state/shard_0_1"]),
)
def test_any_values_in_a_megatron_index(
    attribute: str, value: Any, key: str, megatron: Path
) -> None:
    path = megatron / "release" / ".metadata"
    index = pickle.loads(path.read_bytes())
    setattr(index, attribute, value)
    whole = pickle.dumps(index)
    index = pickle.loads(path.read_bytes())
    index.state_dict_metadata[key] = value
    entry = pickle.dumps(index)
    for content in (whole, entry):
        with changed(path, content):
            convert(megatron)


TARGETS: dict[str, Callable[[Path, Path], Path]] = {
    "config": lambda hf, megatron: hf / "config.json",
    "index": lambda hf, megatron: hf / "model.safetensors.index.json",
    "metadata": lambda hf, megatron: megatron / "release" / ".metadata",
}


@pytest.mark.parametrize("kind", TARGETS)
def test_the_corpus(kind: str, hf: Path, megatron: Path) -> None:
    for path in of_corpus(kind):
        target = TARGETS[kind](hf, megatron)
        with changed(target, path.read_bytes()):
            assert convert(megatron if kind == "metadata" else hf) == 1, path
