"""The library route: layerwise learning rates in anyone's Megatron-Core loop."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer import get_megatron_optimizer as build_megatron_optimizer
from megatron.training import print_rank_0

from megatron_llr.config import LLRConfig, flag
from megatron_llr.controller import LayerwiseController
from megatron_llr.errors import user_error
from megatron_llr.matrices.index import build_matrix_index
from megatron_llr.matrices.shard import MatrixShard
from megatron_llr.measurement.master_weights import MasterCopies, MasterSlice
from megatron_llr.measurement.measure import SpectrumEngine
from megatron_llr.megatron import versions
from megatron_llr.megatron.catalog import build_catalog, require_known
from megatron_llr.megatron.model_chunks import synchronize_parameters
from megatron_llr.megatron.stepped_tensors import (
    inner_optimizers,
    leaf_optimizers,
    stepped_tensors_of,
)
from megatron_llr.param_groups.layer_groups import LayerGroups
from megatron_llr.policies import acts_on, read_role_table
from megatron_llr.policy_table import WEIGHT_DECAY
from megatron_llr.ranks import gather_distinct, gather_objects, require_equal, together
from megatron_llr.telemetry.csv_log import CsvLog
from megatron_llr.telemetry.observer import Observer

_LAYER_GROUPS = "llr_layer_groups"
"""Attribute of the optimizer that holds the layer groups built with it."""

UNSTEPPABLE: Mapping[str, str] = {
    "optimizer_cpu_offload": "its host copies are stepped by optimizers that it rebuilds at will",
    "optimizer_cuda_graph": "layer groups come by Python hooks, which a graph records once",
    "overlap_param_gather_with_optimizer_step": "it steps model chunks one by one, amid gathers",
}
"""Settings of Megatron's OptimizerConfig that layer groups do not work with -> why."""

# Settings that may differ from node to node without changing what is trained.
_LOCAL_SETTINGS = frozenset({"log_dir"})


def require_same_settings(config: LLRConfig, **others: Any) -> None:
    """Check that every rank was given the same. Enter on all ranks, before anything else.

    Args:
        config: settings of the extension; where it writes may differ.
        others: the host's settings by the names of their flags, with underscores.

    Raises:
        ValueError: if the file of `--llr-role-table` cannot be read.
        RuntimeError: naming the first setting that differs, its values and the ranks.
    """
    settings = {
        flag(field): value
        for field, value in asdict(config).items()
        if field not in _LOCAL_SETTINGS
    }
    settings |= {f"--{name.replace('_', '-')}": value for name, value in others.items()}
    settings |= {"the version of torch": torch.__version__, **versions.versions()}
    require_equal(settings, lambda setting: f"give every rank the same {setting}")
    table = config.role_table
    if table is not None:
        # The path is the same everywhere; what counts is what each rank finds there.
        found = {f"what {flag('role_table')} holds": together(lambda: dict(read_role_table(table)))}
        require_equal(found, lambda _: f"give every rank the same file {table}")


def _refuse_unsteppable(config: Any) -> None:
    for name, reason in UNSTEPPABLE.items():
        if getattr(config, name, False):
            raise user_error(
                f"{name} is not supported yet: {reason}",
                got=f"{name}=True",
                allowed=f"{name}=False",
                remedy=f"leave it out of the OptimizerConfig (--{name.replace('_', '-')})",
            )


def _build_layer_groups(
    optimizer: Any, model_chunks: Sequence[torch.nn.Module], config: LLRConfig
) -> LayerGroups:
    for leaf in leaf_optimizers(optimizer):
        _refuse_unsteppable(leaf.config)
    catalog = together(lambda: build_catalog(model_chunks)).shards
    target = together(lambda: acts_on(config.policy))
    require_equal(
        {f"what {flag('policy')} {config.policy} acts on": target},
        lambda _: "give every rank the same function",
    )
    on_decay = target == WEIGHT_DECAY
    groups = together(
        lambda: LayerGroups(
            inner_optimizers(optimizer),
            catalog,
            decoupled_decay=config.weight_decay == "decoupled",
            on_decay=on_decay,
            step=config.step,
        )
    )
    setattr(optimizer, _LAYER_GROUPS, groups)
    return groups


def _require_built_for(groups: LayerGroups, config: LLRConfig) -> None:
    """What multipliers do is settled when the optimizer is built."""
    for field, built, asked in (
        ("policy", groups.on_decay, acts_on(config.policy) == WEIGHT_DECAY),
        ("weight_decay", groups.decoupled_decay, config.weight_decay == "decoupled"),
    ):
        if built != asked:
            raise user_error(
                f"attach() got another {flag(field)} than the optimizer was built for",
                got=getattr(config, field),
                allowed="what get_megatron_optimizer(..., llr=...) was given",
                remedy="give both the same LLRConfig",
            )


def _place_weights(
    model_chunks: Sequence[torch.nn.Module], config: LLRConfig, vocab_size: int | None
) -> tuple[MatrixShard, ...]:
    """The catalog of this rank; every rank knows what any could not place.

    Raises:
        ValueError: naming weights that no table places, without `--llr-skip-unknown`.
    """
    catalog = together(lambda: build_catalog(model_chunks, vocab_size=vocab_size))
    unknown = sorted({name for names in gather_objects(catalog.unknown) for name in names})
    if not config.skip_unknown:
        require_known(unknown)
    elif unknown:
        say(f"no table places these weights, multiplier 1: {'; '.join(unknown)}")
    return catalog.shards


def _master_copies(optimizer: Any) -> MasterCopies:
    """Slices of the fp32 weights that this rank holds.

    Raises:
        ValueError: if the optimizer keeps them where nobody else can read them.
    """
    slices, groups = [], []
    for leaf in leaf_optimizers(optimizer):
        group = getattr(leaf, "data_parallel_group", None)
        if group is not None:
            groups.append(group)
        for master in stepped_tensors_of(leaf):
            if master.tensor.dtype != torch.float32:
                raise user_error(
                    f"{flag('spectrum_source')} master needs fp32 weights in the optimizer",
                    got=f"{master.tensor.dtype}; --use-precision-aware-optimizer hides them",
                    allowed="the distributed optimizer, or --bf16 or --fp16 without it",
                    remedy=f"{flag('spectrum_source')} model",
                )
            slices.append(MasterSlice(master.parameter, master.tensor, master.start, group))
    return MasterCopies(tuple(slices), tuple(groups))


def get_megatron_optimizer(
    config: Any,
    model_chunks: list[torch.nn.Module],
    *args: Any,
    llr: LLRConfig | None = None,
    **kwargs: Any,
) -> Any:
    """Megatron's `get_megatron_optimizer`, with layer param groups where `llr` is given.

    Args:
        config: Megatron's OptimizerConfig.
        model_chunks: model chunks, wrapped in DistributedDataParallel.
        llr: settings of the extension; without it this is Megatron's own function.
        args: passed on.
        kwargs: passed on.

    Returns:
        The MegatronOptimizer, its own param groups unchanged. Until `attach` and `prepare` it steps
        exactly as Megatron's.

    Raises:
        ValueError: if the policy cannot be loaded, or the optimizer cannot have layer groups
            (`UNSTEPPABLE`).
        RuntimeError: if settings differ between ranks, or weights are cut in ways that are not
            followed (GTP, FSDP).
    """
    if llr is not None:
        require_same_settings(llr)
        _refuse_unsteppable(config)
    optimizer = build_megatron_optimizer(config, model_chunks, *args, **kwargs)
    if llr is not None:
        _build_layer_groups(optimizer, model_chunks, llr)
    return optimizer


def say(line: str) -> None:
    """Print a line of the extension's, on rank 0."""
    print_rank_0(f"[llr] {line}")


def make_observer(config: LLRConfig, **kwargs: Any) -> Observer:
    """The observer of this rank: the CSV files lie on rank 0.

    Args:
        config: `log_dir` and `log_matrices` are read.
        kwargs: further arguments of `Observer`.
    """
    folder = config.log_dir if dist.get_rank() == 0 else None
    by_role = config.log_matrices == "roles"
    csv_log = CsvLog(folder, by_role=by_role) if folder else None
    return Observer(say=say, csv_log=csv_log, by_role=by_role, **kwargs)


def attach(
    model_chunks: list[torch.nn.Module],
    optimizer: Any,
    config: LLRConfig,
    *,
    total_updates: int,
    iteration: int = 0,
    vocab_size: int | None = None,
    observer: Observer | None = None,
) -> LayerwiseController:
    """Tie a controller to a model and its optimizer. Enter on all ranks.

    Args:
        model_chunks: as given to `get_megatron_optimizer`.
        optimizer: what it returned; from Megatron's own function too.
        config: settings of the extension.
        total_updates: updates of the whole training run.
        iteration: updates done before.
        vocab_size: rows of embedding and head before padding, if they are to be measured.
        observer: where measurements go; by default the CSV files of `config.log_dir`.

    Returns:
        The controller; call its `prepare()` once the weights are loaded.

    Raises:
        ValueError: if a weight has no place in the tables, no matrix can be tuned, or the optimizer
            was built for other settings.
        RuntimeError: if settings differ between ranks.
    """
    if observer is None:
        observer = make_observer(config)
    require_same_settings(
        config,
        train_iters=total_updates,
        vocab_size=vocab_size,
        log_interval=observer.log_interval,
    )
    groups = getattr(optimizer, _LAYER_GROUPS, None)
    if groups is None:
        groups = _build_layer_groups(optimizer, model_chunks, config)
    else:
        _require_built_for(groups, config)
    catalog = _place_weights(model_chunks, config, vocab_size)
    matrix_index = build_matrix_index(catalog)
    inseparable: dict[str, str] = {}
    for reported in gather_distinct(groups.inseparable):
        inseparable.update(reported)
    if inseparable and config.granularity != "parameter":
        say(
            f"{', '.join(sorted(set(inseparable.values())))} cannot step parts of a tensor: "
            f"{len(inseparable)} fused matrices share the mean multiplier of their parameter"
        )
    masters = None
    if config.spectrum_source == "master":
        masters = together(lambda: _master_copies(optimizer))
    return LayerwiseController(
        config,
        matrix_index,
        catalog,
        SpectrumEngine(catalog, matrix_index, config, masters),
        groups,
        observer,
        inseparable=frozenset(inseparable),
        synchronize=lambda: synchronize_parameters(model_chunks, optimizer),
        total_updates=total_updates,
        iteration=iteration,
    )
