"""A Megatron checkpoint to Hugging Face safetensors.

Memory holds one fused tensor, its parts, and one file of the output at a time, whatever the size of
the model.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_llr import state
from megatron_llr.errors import user_error
from megatron_llr.output import require_space, staged_folder
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
    named = settings.read_json(config).get("vocab_size") if config is not None else None
    vocab = int(options.vocab_size or named or getattr(args, "vocab_size", None) or padded)
    if not 0 < vocab <= padded:
        raise user_error(
            "the vocabulary to keep is larger than the checkpoint's",
            got=vocab,
            allowed=f"1 to {padded}",
            remedy="choose it with --vocab-size",
        )
    return vocab


def _common_state(folder: Path) -> dict[str, Any]:
    """What a checkpoint holds beside tensors: args, and the scheduler with our state."""
    from megatron.core.dist_checkpointing.serialization import (
        load_common_state_dict,  # Megatron's own reader
    )
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        return dict(load_common_state_dict(str(folder)))
    except (Exception, CheckpointException) as broken:
        raise unreadable(f"the settings saved in {folder}", broken) from broken


def _carried_config(folder: Path, options: Options) -> Path | None:
    """config.json to carry over: of `--files`, else of the conversion that made the checkpoint."""
    if options.files is not None:
        if not (options.files / CONFIG).exists():
            raise user_error(
                f"no {CONFIG} in {options.files}",
                got="no such file",
                allowed="a Hugging Face folder",
                remedy="leave --files out: config.json is then made from Megatron's args",
            )
        return options.files / CONFIG
    beside = folder.parent / HUGGING_FACE / CONFIG
    return beside if beside.exists() else None


def _check_config(config: Path, carried: Architecture, model: Architecture) -> None:
    differ = {
        name: (getattr(carried, name), value)
        for name, value in vars(model).items()
        if getattr(carried, name) != value and name != "positions"
    }
    if differ:
        name, (theirs, ours) = next(iter(differ.items()))
        raise user_error(
            f"{config} contradicts the checkpoint",
            got=f"{name} {theirs} there, {ours} in the checkpoint",
            allowed="the config.json of this model",
            remedy="name another folder with --files",
        )


def _end_of_document(args: Any) -> int | None:
    """Id that ends a document, where Megatron's args tell it: the last of a NullTokenizer's."""
    if getattr(args, "tokenizer_type", None) != "NullTokenizer":
        return None
    named = getattr(args, "null_tokenizer_eod_id", None)
    return int(args.vocab_size) - 1 if named is None else int(named)


def _made_config(family: Family, model: Architecture, dtype: str, args: Any) -> dict[str, Any]:
    """config.json where none is carried over."""
    config = settings.to_config(family, model, dtype)
    # Without these transformers takes the family's own, ids 1 and 2.
    return config | {"bos_token_id": None, "eos_token_id": _end_of_document(args)}


def _write(path: Path, document: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2) + "\n")


def _mend_config(config: Path, dtype: str, vocab: int | None) -> None:
    """Mend a config.json that was carried over if it contradicts the weights; else no byte changes.

    Args:
        config: the file.
        dtype: of the weights; a config.json may leave it out.
        vocab: rows that the user chose, if any.
    """
    held = settings.read_json(config)
    changes: dict[str, Any] = {key: dtype for key in ("dtype", "torch_dtype") if held.get(key)}
    if vocab is not None:
        changes["vocab_size"] = vocab
    if {**held, **changes} != held:
        _write(config, {**held, **changes})


def _check_tensors(reader: TorchDistReader, links: list[Link], model: Architecture) -> None:
    for link in links:
        if reader.shape(link.key, link.layer) != link.shape:
            raise user_error(
                f"{link.key} contradicts the checkpoint's args",
                got=list(reader.shape(link.key, link.layer)),
                allowed=str(list(link.shape)),
                remedy="the checkpoint is broken: take an earlier one with --iteration",
            )
        if link.layer is not None and reader.layers(link.key) not in (1, model.layers):
            raise user_error(
                f"{link.key} contradicts the checkpoint's args",
                got=f"{reader.layers(link.key)} layers",
                allowed=f"{model.layers}",
                remedy="the checkpoint is broken: take an earlier one with --iteration",
            )
    known = {link.key.removeprefix(LAYER_PREFIX) for link in links}
    unknown = sorted(
        key
        for key in reader.tensors
        if key.startswith(_MODEL_PREFIXES) and not key.endswith(tuple(known))
    )
    if unknown:
        raise user_error(
            "the checkpoint has tensors that no table names",
            got=f"{unknown[0]} ({len(unknown)} in all)",
            allowed="the tensors of a dense GPT model",
            remedy="a new tensor is a row in megatron_llr/tools/convert/model_families.py",
        )


def to_hugging_face(
    source: Path, target: Path, options: Options, progress: Progress | None = None
) -> Report:
    """A Megatron torch_dist checkpoint, of any layout, to Hugging Face safetensors.

    The optimizer is left behind. The extension's state is written beside the weights.

    Args:
        source: what Megatron's `--save` named, or the folder of one iteration.
        target: new folder.
        options: all but `vocab_multiple` count.
        progress: told of every tensor.

    Raises:
        ValueError: see the messages; nothing is left at the target then.
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
            _mend_config(output / CONFIG, dtype_name(dtype), options.vocab_size)
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
        report.notes.append(f"vocabulary: {padded - model.vocab} rows of padding left behind")
    optimizer = [key for key in reader.tensors if not key.startswith(_MODEL_PREFIXES)]
    report.notes.append(f"left behind: {len(optimizer)} tensors of the optimizer")
    if document is not None:
        report.notes.append(f"layerwise state: {STATE}")
    return report
