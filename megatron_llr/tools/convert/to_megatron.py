"""Hugging Face safetensors to a Megatron checkpoint.

Memory holds one fused tensor and its parts at a time, whatever the size of the model.
"""

import argparse
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import torch

from megatron_llr.errors import user_error
from megatron_llr.output import require_space, staged_folder
from megatron_llr.tools.convert import settings
from megatron_llr.tools.convert.architecture import Architecture
from megatron_llr.tools.convert.hugging_face import (
    CONFIG,
    SafetensorsFolder,
    carry_files,
    dtype_name,
)
from megatron_llr.tools.convert.links import LAYER_PREFIX, Link, links_of
from megatron_llr.tools.convert.model_families import Family
from megatron_llr.tools.convert.options import FLAGS, HUGGING_FACE, TRACKER, Options
from megatron_llr.tools.convert.printout import Report
from megatron_llr.tools.convert.write_torch_dist import Piece, write_torch_dist
from megatron_llr.tools.progress import Progress

# Modules of a layer, and of the model, that ask a checkpoint for an extra state, the scales of fp8:
# Megatron's own or Transformer Engine's. None tells them that there is none.
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
    """A head beside a tied embedding repeats it: Megatron's model has no place for another."""
    if _HEAD in source.entries and not source.same(_HEAD, _EMBEDDING):
        raise user_error(
            f"{_HEAD} is not the embedding, which config.json ties it to",
            got=f"other numbers than {_EMBEDDING}",
            allowed="the same tensor, or none",
            remedy="set tie_word_embeddings to false in config.json",
        )


def _check_parts(source: SafetensorsFolder, links: list[Link], family: Family, tied: bool) -> None:
    """The folder has the tensors of the model, of the shapes that config.json says, and no more."""
    names = {part.name: part for link in links for part in link.parts}
    missing = sorted(set(names) - set(source.entries))
    if missing:
        raise user_error(
            f"{source.folder} lacks a tensor of the model",
            got=f"no {missing[0]} ({len(missing)} missing)",
            allowed="the tensors that its config.json speaks of",
            remedy="copy the folder anew, or mend config.json",
        )
    for name, part in names.items():
        if source.entries[name].shape != part.shape:
            raise user_error(
                f"{name} contradicts config.json",
                got=list(source.entries[name].shape),
                allowed=str(list(part.shape)),
                remedy="mend config.json, or copy the weights anew",
            )
    known = (*family.ignored, _HEAD) if tied else family.ignored
    unknown = sorted(n for n in set(source.entries) - set(names) if not n.endswith(known))
    if unknown:
        raise user_error(
            f"{source.folder} has tensors that the {family.model_type} table does not name",
            got=f"{unknown[0]} ({len(unknown)} in all)",
            allowed="the tensors of a causal language model of the family",
            remedy="a new tensor is a row in megatron_llr/tools/convert/model_families.py",
        )


def _pieces(links: list[Link], model: Architecture, dtype_of: Callable[[Link], Any]) -> list[Piece]:
    pieces: list[Piece] = []
    of_key: dict[str, torch.dtype] = {}
    for link in links:
        dtype = dtype_of(link)
        if of_key.setdefault(link.key, dtype) != dtype:
            raise user_error(
                f"the tensors of {link.key} differ in dtype",
                got=f"{dtype_name(of_key[link.key])} and {dtype_name(dtype)}",
                allowed="one dtype over all layers",
                remedy="choose one with --dtype",
            )
        pieces.append(Piece(link.key, link.layer, link.shape, model.layers, dtype))
    return pieces


def _objects(model: Architecture, padded: int) -> dict[str, Any]:
    """What a Megatron checkpoint holds beside tensors."""
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
    """Hugging Face safetensors to a Megatron torch_dist checkpoint, for any layout.

    Args:
        source: folder with config.json and safetensors.
        target: new folder; `--load` takes it. Iteration 0, without optimizer (`release`).
        options: `dtype` and `vocab_multiple` count.
        progress: told of every tensor.

    Raises:
        ValueError: see the messages; nothing is left at the target then.
    """
    family, model = settings.from_config(source / CONFIG)
    padded = -(-model.vocab // options.vocab_multiple) * options.vocab_multiple
    links = links_of(family, model, padded)
    weights = SafetensorsFolder(source)
    _check_parts(weights, links, family, model.tied)
    if model.tied:
        _check_tied(weights)

    def dtype_of(link: Link) -> torch.dtype:
        found = {weights.dtype(part.name) for part in link.parts}
        if options.dtype is None and len(found) > 1:
            raise user_error(
                f"the parts of {link.key} differ in dtype",
                got=", ".join(sorted(map(dtype_name, found))),
                allowed="one dtype",
                remedy="choose one with --dtype",
            )
        return options.dtype or found.pop()

    by_place = {(link.key, link.layer): link for link in links}

    def make(piece: Piece) -> torch.Tensor:
        link = by_place[piece.key, piece.layer]
        fused = link.fuse((weights.read(part.name) for part in link.parts), piece.dtype)
        if progress is not None:
            progress.advance(fused.nbytes, piece.key)
        return fused

    pieces = _pieces(links, model, dtype_of)
    report = Report(links)
    size = sum(prod(piece.shape) * piece.dtype.itemsize for piece in pieces)
    if progress is not None:
        progress.expect(size)
    with staged_folder(target) as folder:
        require_space(folder, size)
        (folder / "release").mkdir()
        write_torch_dist(folder / "release", pieces, make, _objects(model, padded))
        carried = carry_files(source, folder / HUGGING_FACE)
        (folder / FLAGS).write_text("\n".join(settings.to_flags(model, padded)) + "\n")
        (folder / TRACKER).write_text("release")
    if padded != model.vocab:
        report.notes.append(f"vocabulary padded with zeros from {model.vocab} to {padded} rows")
    report.notes.append(f"carried over to {HUGGING_FACE}/: {', '.join(carried)}")
    report.notes.append(f"flags of the model: {FLAGS}; train with --load {target}")
    return report
