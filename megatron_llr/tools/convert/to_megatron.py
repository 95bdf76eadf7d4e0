"""Hugging Face safetensors to a Megatron checkpoint.

Memory holds one fused tensor and its parts at a time, independent of the model's size.
"""

import argparse
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import torch

from megatron_llr.errors import input_error
from megatron_llr.output import and_more, require_space, staged_folder
from megatron_llr.tools.convert import settings
from megatron_llr.tools.convert.architecture import Architecture
from megatron_llr.tools.convert.hugging_face import SafetensorsFolder, dtype_name
from megatron_llr.tools.convert.links import LAYER_PREFIX, Link, links_of
from megatron_llr.tools.convert.model_families import Family
from megatron_llr.tools.convert.options import FLAGS, HUGGING_FACE, TRACKER, Options
from megatron_llr.tools.convert.printout import Report
from megatron_llr.tools.convert.tokenizer_files import CONFIG, copy_model_files, copy_tokenizer
from megatron_llr.tools.convert.write_torch_dist import SavedTensor, write_torch_dist
from megatron_llr.tools.progress import Progress

# Modules of a layer, and of the model, that load an extra state (FP8 scales) from a checkpoint, in
# Megatron's or in Transformer Engine's implementation. None means that there is no extra state.
_LAYER_EXTRA = (
    "self_attention.linear_qkv",
    "self_attention.core_attention",
    "self_attention.linear_proj",
    "self_attention.q_layernorm",
    "self_attention.k_layernorm",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
)
_MODEL_EXTRA = ("decoder.final_layernorm",)

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


def _check_tied(source: SafetensorsFolder) -> None:
    """Check that the head equals a tied embedding: Megatron's model stores only one of them."""
    if _HEAD in source.entries and not source.same(_HEAD, _EMBEDDING):
        raise input_error(
            f"config.json ties {_HEAD} to {_EMBEDDING}, but their values differ. A tied head must "
            "equal the embedding or be absent. If the model is not tied, set tie_word_embeddings "
            "to false in config.json."
        )


def _check_depth(source: SafetensorsFolder, model: Architecture) -> None:
    """Check the number of layers before a table of all their tensors is made."""
    if model.layers > len(source.entries):
        raise input_error(
            f"{source.folder / CONFIG} has num_hidden_layers = {model.layers}, but the folder "
            f"has only {len(source.entries)} tensors. Copy the folder again, or correct {CONFIG}."
        )


def _check_parts(source: SafetensorsFolder, links: list[Link], family: Family, tied: bool) -> None:
    """Check that the folder has exactly the model's tensors, in the shapes of config.json."""
    names = {part.name: part for link in links for part in link.parts}
    missing = sorted(set(names) - set(source.entries))
    if missing:
        raise input_error(
            f"{source.folder} has no {and_more(missing)}. It must have all tensors that its "
            "config.json implies. Copy the folder again, or correct config.json."
        )
    for name, part in names.items():
        if source.entries[name].shape != part.shape:
            raise input_error(
                f"{name} has shape {list(source.entries[name].shape)}. By config.json it must be "
                f"{list(part.shape)}. Correct config.json, or copy the weights again."
            )
    known = (*family.ignored, _HEAD) if tied else family.ignored
    unknown = sorted(n for n in set(source.entries) - set(names) if not n.endswith(known))
    if unknown:
        raise input_error(
            f"{source.folder} has tensors that the {family.model_type} table does not list: "
            f"{and_more(unknown)}. Only the tensors of a causal language model of the family can "
            "be converted. To add a tensor, add a row in "
            "megatron_llr/tools/convert/model_families.py."
        )


def _saved_tensors(
    links: list[Link], model: Architecture, dtype_of: Callable[[Link], Any]
) -> list[SavedTensor]:
    tensors: list[SavedTensor] = []
    of_key: dict[str, torch.dtype] = {}
    for link in links:
        dtype = dtype_of(link)
        if of_key.setdefault(link.key, dtype) != dtype:
            raise input_error(
                f"The layers of {link.key} have the dtypes {dtype_name(of_key[link.key])} and "
                f"{dtype_name(dtype)}. All layers must have one dtype. Choose one with --dtype."
            )
        tensors.append(SavedTensor(link.key, link.layer, link.shape, model.layers, dtype))
    return tensors


def _objects(model: Architecture, padded: int) -> dict[str, Any]:
    """The contents of a Megatron checkpoint other than tensors."""
    common = {
        "args": argparse.Namespace(**settings.to_args(model, padded)),
        "checkpoint_version": 3.0,
        "iteration": 0,
        "content_metadata": {"singleton_local_shards": False, "chained_optim_avoid_prefix": True},
    }
    extra = {f"{module}._extra_state/shard_0_1": None for module in _MODEL_EXTRA}
    for module in _LAYER_EXTRA:
        for layer in range(model.layers):
            extra[f"{LAYER_PREFIX}{module}._extra_state/shard_{layer}_{model.layers}"] = None
    return {"common_state/shard_0_1": common, **extra}


def to_megatron(
    source: Path, target: Path, options: Options, progress: Progress | None = None
) -> Report:
    """Convert Hugging Face safetensors to a Megatron torch_dist checkpoint for any layout.

    Args:
        source: folder with config.json and safetensors.
        target: new folder for `--load`. Iteration 0, without optimizer state (`release`).
        options: `dtype` and `vocab_multiple` are used.
        progress: advanced by every tensor.

    Raises:
        ValueError: for invalid input, or if writing fails; the target is then not created.
    """
    family, model = settings.from_config(source / CONFIG)
    padded = -(-model.vocab // options.vocab_multiple) * options.vocab_multiple
    weights = SafetensorsFolder(source)
    _check_depth(weights, model)
    links = links_of(family, model, padded)
    _check_parts(weights, links, family, model.tied)
    if model.tied:
        _check_tied(weights)

    def dtype_of(link: Link) -> torch.dtype:
        dtypes = {weights.dtype(part.name) for part in link.parts}
        if options.dtype is None and len(dtypes) > 1:
            raise input_error(
                f"The parts of {link.key} have the dtypes "
                f"{' and '.join(sorted(map(dtype_name, dtypes)))}. All parts must have one dtype. "
                "Choose one with --dtype."
            )
        return options.dtype or dtypes.pop()

    by_place = {(link.key, link.layer): link for link in links}

    def make(entry: SavedTensor) -> torch.Tensor:
        link = by_place[entry.key, entry.layer]
        fused = link.fuse((weights.read(part.name) for part in link.parts), entry.dtype)
        if progress is not None:
            progress.advance(fused.nbytes, entry.key)
        return fused

    tensors = _saved_tensors(links, model, dtype_of)
    report = Report(links, list(weights.notes))
    size = sum(prod(entry.shape) * entry.dtype.itemsize for entry in tensors)
    if progress is not None:
        progress.expect(size)
    with staged_folder(target) as folder:
        require_space(folder, size)
        (folder / "release").mkdir()
        write_torch_dist(folder / "release", tensors, make, _objects(model, padded))
        carried = copy_model_files(source, folder / HUGGING_FACE)
        carried += copy_tokenizer(source, folder / HUGGING_FACE)
        (folder / FLAGS).write_text("\n".join(settings.to_flags(model, padded)) + "\n")
        (folder / TRACKER).write_text("release")
    if padded != model.vocab:
        report.notes.append(f"vocabulary padded with zeros from {model.vocab} to {padded} rows")
    report.notes.append(f"copied to {HUGGING_FACE}/: {', '.join(carried)}")
    report.notes.append(f"flags of the model: {FLAGS}; train with --load {target}")
    return report
