"""The library route: layerwise learning rates in a training loop of one's own."""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer import get_megatron_optimizer as build_megatron_optimizer

from megatron_llr.config import LLRConfig, flag
from megatron_llr.controller import LayerwiseController
from megatron_llr.errors import input_error
from megatron_llr.measurement.master_weights import MasterCopies, MasterSlice
from megatron_llr.measurement.measure import SpectrumEngine
from megatron_llr.megatron.assembly import (
    NamedWeights,
    assemble,
    assembly_of,
    name_weights,
    refuse_unsteppable,
    say,
)
from megatron_llr.megatron.model_chunks import synchronize_parameters
from megatron_llr.megatron.stepped_tensors import leaf_optimizers, stepped_tensors_of
from megatron_llr.ranks import require_equal, together
from megatron_llr.telemetry.csv_log import CsvLog
from megatron_llr.telemetry.observer import Observer


def get_megatron_optimizer(
    config: Any,
    model_chunks: list[torch.nn.Module],
    *args: Any,
    llr: LLRConfig | None = None,
    vocab_size: int | None = None,
    **kwargs: Any,
) -> Any:
    """Megatron's `get_megatron_optimizer`, with layer param groups if `llr` is given.

    Args:
        config: Megatron's OptimizerConfig.
        model_chunks: model chunks, wrapped in DistributedDataParallel.
        llr: settings of the extension; without it this is Megatron's own function.
        vocab_size: tokens of the tokenizer's vocabulary. The rows of embedding and head beyond it
            are padding and are never measured.
        args: passed on.
        kwargs: passed on.

    Returns:
        The MegatronOptimizer, its own param groups unchanged. Until `make_controller` and
        `prepare` it steps exactly as Megatron's.

    Raises:
        ValueError: if the policy cannot be loaded, a weight is not in the tables, no matrix can be
            tuned, the optimizer cannot have layer groups (`UNSTEPPABLE`), or `vocab_size` is
            missing.
        RuntimeError: if settings differ between ranks, or weights are sharded in a way that is not
            supported (GTP, FSDP).
    """
    if llr is None:
        return build_megatron_optimizer(config, model_chunks, *args, **kwargs)
    weights = name_weights(model_chunks, llr, vocab_size)
    return build_optimizer(config, weights, *args, **kwargs)


def build_optimizer(config: Any, weights: NamedWeights, *args: Any, **kwargs: Any) -> Any:
    """Megatron's optimizer of named weights, with layer groups."""
    refuse_unsteppable(config)
    optimizer = build_megatron_optimizer(config, weights.model_chunks, *args, **kwargs)
    assemble(optimizer, weights)
    return optimizer


def add_layer_groups(
    optimizer: Any,
    model_chunks: list[torch.nn.Module],
    llr: LLRConfig,
    *,
    vocab_size: int | None = None,
) -> None:
    """Give layer groups to an optimizer that Megatron's own function built. Enter on all ranks.

    Args:
        optimizer: from Megatron's `get_megatron_optimizer`.
        model_chunks: the model chunks that it was built from.
        llr: settings of the extension.
        vocab_size: as in this package's `get_megatron_optimizer`.

    Raises:
        ValueError: as in this package's `get_megatron_optimizer`; so does RuntimeError.
    """
    assemble(optimizer, name_weights(model_chunks, llr, vocab_size))


def make_controller(
    optimizer: Any, *, total_updates: int, iteration: int = 0, observer: Observer | None = None
) -> LayerwiseController:
    """The controller of an optimizer that has layer groups. Enter on all ranks.

    Args:
        optimizer: from `get_megatron_optimizer` with `llr`, or after `add_layer_groups`.
        total_updates: updates of the whole training run.
        iteration: updates done before.
        observer: writes measurements; by default to the CSV files of `LLRConfig.log_dir`.

    Returns:
        The controller; call its `prepare()` once the weights are loaded.

    Raises:
        ValueError: if the optimizer has no layer groups.
        RuntimeError: if ranks were given different values.
    """
    assembly = assembly_of(optimizer)
    weights = assembly.weights
    config = weights.config
    if observer is None:
        observer = make_observer(config)
    require_equal(
        {"--train-iters": total_updates, "--log-interval": observer.log_interval},
        lambda setting: f"give every rank the same {setting}",
    )
    masters = None
    if config.spectrum_source == "master":
        masters = together(lambda: _master_copies(optimizer))
    return LayerwiseController(
        config,
        weights.matrix_index,
        weights.shards,
        SpectrumEngine(weights.shards, weights.matrix_index, config, masters),
        assembly.layer_groups,
        observer,
        inseparable=assembly.inseparable,
        synchronize=lambda: synchronize_parameters(weights.model_chunks, optimizer),
        total_updates=total_updates,
        iteration=iteration,
    )


def make_observer(config: LLRConfig, **kwargs: Any) -> Observer:
    """The observer of this rank; rank 0 writes the CSV files.

    Args:
        config: `log_dir` and `log_matrices` are read.
        kwargs: further arguments of `Observer`.
    """
    folder = config.log_dir if dist.get_rank() == 0 else None
    by_role = config.log_matrices == "roles"
    csv_log = CsvLog(folder, by_role=by_role) if folder else None
    return Observer(say=say, csv_log=csv_log, by_role=by_role, **kwargs)


def _master_copies(optimizer: Any) -> MasterCopies:
    """Slices of the fp32 weights that this rank holds.

    Raises:
        ValueError: if the optimizer does not expose them.
    """
    slices, groups = [], []
    for leaf in leaf_optimizers(optimizer):
        group = getattr(leaf, "data_parallel_group", None)
        if group is not None:
            groups.append(group)
        for master in stepped_tensors_of(leaf):
            if master.tensor.dtype != torch.float32:
                raise input_error(
                    f"{flag('spectrum_source')} master needs fp32 weights in the optimizer, which "
                    f"has {master.tensor.dtype}: --use-precision-aware-optimizer hides them. Use "
                    "the distributed optimizer without that flag, --bf16 or --fp16 without either, "
                    f"or {flag('spectrum_source')} model."
                )
            slices.append(MasterSlice(master.parameter, master.tensor, master.start, group))
    return MasterCopies(tuple(slices), tuple(groups))
