"""A Megatron checkpoint to Hugging Face safetensors.

Memory holds one fused tensor, its parts, and one output file at a time, independent of the model's
size.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megatron_llr.errors import input_error
from megatron_llr.output import and_more, require_space, staged_folder
from megatron_llr.tools.convert import settings
from megatron_llr.tools.convert.architecture import Architecture
from megatron_llr.tools.convert.hugging_face import Shards, dtype_name
from megatron_llr.tools.convert.input_files import read_json
from megatron_llr.tools.convert.links import LAYER_PREFIX, Link, links_of
from megatron_llr.tools.convert.model_families import Family, family_for
from megatron_llr.tools.convert.options import STATE, Options
from megatron_llr.tools.convert.printout import Report
from megatron_llr.tools.convert.read_torch_dist import (
    TorchDistReader,
    iteration_folder,
    layerwise_state,
)
from megatron_llr.tools.convert.tokenizer_files import (
    CONFIG,
    copy_model_files,
    copy_tokenizer,
    loads_differently,
)
from megatron_llr.tools.convert.vocabulary import Vocabulary, vocabulary_of
from megatron_llr.tools.progress import Progress

_MODEL_PREFIXES = ("embedding.", "encoder.", "decoder.", "output_layer.", "mtp.")
_VOCABULARY = "embedding.word_embeddings.weight"


def _check_config(config: Path, carried: Architecture, model: Architecture) -> None:
    differ = {
        name: (getattr(carried, name), value)
        for name, value in vars(model).items()
        if getattr(carried, name) != value and name != "positions"
    }
    if differ:
        name, (theirs, ours) = next(iter(differ.items()))
        raise input_error(
            f"{config} contradicts the checkpoint: it has {name} {theirs}, but the checkpoint has "
            f"{ours}. It must be the config.json of this model. Choose another folder with --files."
        )


def _write_settings(
    output: Path,
    vocabulary: Vocabulary,
    family: Family,
    model: Architecture,
    dtype: torch.dtype,
    options: Options,
) -> list[str]:
    """Write config.json and the tokenizer's files; returns what the user should know."""
    notes = list(vocabulary.notes)
    if vocabulary.config is None:
        config = settings.to_config(family, model, dtype_name(dtype))
        # Without special ids transformers uses the family's defaults, 1 and 2.
        _write(output / CONFIG, {**config, **vocabulary.special})
    else:
        copy_model_files(vocabulary.config.parent, output)
        _update_config(output / CONFIG, dtype_name(dtype), options.vocab_size)
    if vocabulary.folder is not None:
        copy_tokenizer(vocabulary.folder, output)
        notes.append(f"tokenizer copied from {vocabulary.folder}")
    if vocabulary.tokenizer is not None:
        notes += loads_differently(vocabulary.tokenizer, output)
    return notes


def _write(path: Path, document: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2) + "\n")


def _update_config(config: Path, dtype: str, vocab: int | None) -> None:
    """Update a copied config.json if it contradicts the weights; otherwise no byte changes.

    Args:
        config: the file.
        dtype: of the weights; a config.json may leave it out.
        vocab: rows chosen by the user, if any.
    """
    before = read_json(config)
    changes: dict[str, Any] = {key: dtype for key in ("dtype", "torch_dtype") if before.get(key)}
    if vocab is not None:
        changes["vocab_size"] = vocab
    if {**before, **changes} != before:
        _write(config, {**before, **changes})


def _check_depth(reader: TorchDistReader, model: Architecture) -> None:
    """Check the number of layers before a table of all their tensors is made."""
    if model.layers > reader.depth:
        raise input_error(
            f"The checkpoint's args have num_layers = {model.layers}, but it has the tensors of "
            f"{reader.depth} layers. The checkpoint is damaged: choose an earlier one with "
            "--iteration."
        )


def _check_tensors(reader: TorchDistReader, links: list[Link], model: Architecture) -> None:
    for link in links:
        if reader.shape(link.key, link.layer) != link.shape:
            raise input_error(
                f"{link.key} has shape {list(reader.shape(link.key, link.layer))}. By the "
                f"checkpoint's args it must be {list(link.shape)}. The checkpoint is damaged: "
                "choose an earlier one with --iteration."
            )
        if link.layer is not None and reader.layers(link.key) not in (1, model.layers):
            raise input_error(
                f"{link.key} has {reader.layers(link.key)} layers. By the checkpoint's args it "
                f"must have {model.layers}. The checkpoint is damaged: choose an earlier one with "
                "--iteration."
            )
    known = {link.key.removeprefix(LAYER_PREFIX) for link in links}
    unknown = sorted(
        key
        for key in reader.tensors
        if key.startswith(_MODEL_PREFIXES) and not key.endswith(tuple(known))
    )
    if unknown:
        raise input_error(
            f"The checkpoint has tensors that no table lists: {and_more(unknown)}. Only the "
            "tensors of a dense GPT model can be converted. To add a tensor, add a row in "
            "megatron_llr/tools/convert/model_families.py."
        )


def to_hugging_face(
    source: Path, target: Path, options: Options, progress: Progress | None = None
) -> Report:
    """Convert a Megatron torch_dist checkpoint of any layout to Hugging Face safetensors.

    Optimizer state is not converted. The extension's state is written next to the weights.

    Args:
        source: the folder given to Megatron's `--save`, or the folder of one iteration.
        target: new folder.
        options: all except `vocab_multiple` are used.
        progress: advanced by every tensor.

    Raises:
        ValueError: for invalid input, or if writing fails; the target is then not created.
    """
    folder = iteration_folder(source, options.iteration)
    reader = TorchDistReader(folder)
    common = reader.common_state()
    padded = (reader.shape(_VOCABULARY, None) or (0,))[0]
    vocabulary = vocabulary_of(common["args"], folder, padded, options)
    model = settings.from_args(common["args"], vocabulary.rows)
    family = family_for(model)
    if vocabulary.config is not None:
        family, theirs = settings.from_config(vocabulary.config)
        _check_config(vocabulary.config, replace(theirs, vocab=model.vocab), model)
    _check_depth(reader, model)
    links = links_of(family, model, padded)
    _check_tensors(reader, links, model)
    dtype = options.dtype or reader.dtype(_VOCABULARY, None)
    document = layerwise_state(common)
    report = Report(links)
    size = report.numel * dtype.itemsize
    if progress is not None:
        progress.expect(size)
    with staged_folder(target) as output:
        require_space(output, size)
        report.notes += _write_settings(output, vocabulary, family, model, dtype, options)
        shards = Shards(output, options.shard_size)
        for link in links:
            fused = reader.read(link.key, link.layer)
            parts = link.split(fused if options.dtype is None else fused.to(options.dtype))
            shards.add(parts.items())
            if progress is not None:
                progress.advance(sum(part.nbytes for part in parts.values()), link.key)
        files = shards.close()
        if document is not None:
            _write(output / STATE, document)
    report.notes.append(f"written as {family.model_type} in {len(files)} file(s)")
    if padded != model.vocab:
        report.notes.append(f"vocabulary: {padded - model.vocab} padding rows removed")
    optimizer = [key for key in reader.tensors if not key.startswith(_MODEL_PREFIXES)]
    report.notes.append(f"not converted: {len(optimizer)} tensors of the optimizer")
    if document is not None:
        report.notes.append(f"layerwise state: {STATE}")
    return report
