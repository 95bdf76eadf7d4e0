"""A Megatron checkpoint to Hugging Face safetensors.

Memory holds one fused tensor, its parts, and one output file at a time, independent of the model's
size.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_llr import state
from megatron_llr.errors import input_error
from megatron_llr.output import and_more, require_space, staged_folder
from megatron_llr.tools.convert import settings
from megatron_llr.tools.convert.architecture import Architecture
from megatron_llr.tools.convert.hugging_face import CONFIG, Shards, carry_files, dtype_name
from megatron_llr.tools.convert.links import LAYER_PREFIX, Link, links_of
from megatron_llr.tools.convert.model_families import Family, family_for
from megatron_llr.tools.convert.options import HUGGING_FACE, STATE, Options
from megatron_llr.tools.convert.printout import Report
from megatron_llr.tools.convert.read_torch_dist import TorchDistReader, iteration_folder, unreadable
from megatron_llr.tools.progress import Progress

_MODEL_PREFIXES = ("embedding.", "encoder.", "decoder.", "output_layer.", "mtp.")
_VOCABULARY = "embedding.word_embeddings.weight"


def _vocabulary(args: Any, padded: int, options: Options, config: Path | None) -> int:
    """Rows of the vocabulary to keep."""
    configured = settings.read_json(config).get("vocab_size") if config is not None else None
    vocab = int(options.vocab_size or configured or getattr(args, "vocab_size", None) or padded)
    if not 0 < vocab <= padded:
        raise input_error(
            f"The vocabulary size {vocab} is not valid for this checkpoint. It must be 1 to "
            f"{padded}. Set it with --vocab-size."
        )
    return vocab


def _common_state(folder: Path) -> dict[str, Any]:
    """The contents of a checkpoint other than tensors: args, and the scheduler with our state."""
    from megatron.core.dist_checkpointing.serialization import (
        load_common_state_dict,  # Megatron's own reader
    )
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        return dict(load_common_state_dict(str(folder)))
    except (Exception, CheckpointException) as broken:
        raise unreadable(f"the settings saved in {folder}", broken) from broken


def _carried_config(folder: Path, options: Options) -> Path | None:
    """config.json to copy: from `--files`, or from the conversion that made the checkpoint."""
    if options.files is not None:
        if not (options.files / CONFIG).exists():
            raise input_error(
                f"There is no {CONFIG} in {options.files}. --files must be a Hugging Face folder. "
                f"Without --files, {CONFIG} is made from Megatron's args."
            )
        return options.files / CONFIG
    converted = folder.parent / HUGGING_FACE / CONFIG
    return converted if converted.exists() else None


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


def _end_of_document(args: Any) -> int | None:
    """Id of the end-of-document token if Megatron's args imply it: a NullTokenizer's last id."""
    if getattr(args, "tokenizer_type", None) != "NullTokenizer":
        return None
    eod = getattr(args, "null_tokenizer_eod_id", None)
    return int(args.vocab_size) - 1 if eod is None else int(eod)


def _made_config(family: Family, model: Architecture, dtype: str, args: Any) -> dict[str, Any]:
    """A config.json, for when there is none to copy."""
    config = settings.to_config(family, model, dtype)
    # Without these transformers uses the family's defaults, ids 1 and 2.
    return config | {"bos_token_id": None, "eos_token_id": _end_of_document(args)}


def _write(path: Path, document: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2) + "\n")


def _update_config(config: Path, dtype: str, vocab: int | None) -> None:
    """Update a copied config.json if it contradicts the weights; otherwise no byte changes.

    Args:
        config: the file.
        dtype: of the weights; a config.json may leave it out.
        vocab: rows chosen by the user, if any.
    """
    before = settings.read_json(config)
    changes: dict[str, Any] = {key: dtype for key in ("dtype", "torch_dtype") if before.get(key)}
    if vocab is not None:
        changes["vocab_size"] = vocab
    if {**before, **changes} != before:
        _write(config, {**before, **changes})


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
    common = _common_state(folder)
    padded = reader.shape(_VOCABULARY, None)[0]
    carried = _carried_config(folder, options)
    model = settings.from_args(
        common["args"], _vocabulary(common["args"], padded, options, carried)
    )
    family = family_for(model)
    if carried is not None:
        family, theirs = settings.from_config(carried)
        vocab = options.vocab_size or theirs.vocab
        _check_config(carried, replace(theirs, vocab=vocab), model)
    links = links_of(family, model, padded)
    _check_tensors(reader, links, model)
    dtype = options.dtype or reader.dtype(_VOCABULARY, None)
    report = Report(links)
    size = report.numel * dtype.itemsize
    if progress is not None:
        progress.expect(size)
    with staged_folder(target) as output:
        require_space(output, size)
        if carried is None:
            _write(output / CONFIG, _made_config(family, model, dtype_name(dtype), common["args"]))
        else:
            carry_files(carried.parent, output)
            _update_config(output / CONFIG, dtype_name(dtype), options.vocab_size)
        shards = Shards(output, options.shard_size)
        for link in links:
            fused = reader.read(link.key, link.layer)
            parts = link.split(fused if options.dtype is None else fused.to(options.dtype))
            shards.add(parts.items())
            if progress is not None:
                progress.advance(sum(part.nbytes for part in parts.values()), link.key)
        files = shards.close()
        document = state.decode(common.get("opt_param_scheduler", {}).get(state.KEY))
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
