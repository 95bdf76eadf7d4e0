"""The parts of a run, built once: agreed settings, named weights, layer groups."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from megatron.training import print_rank_0

from megatron_llr.config import LLRConfig, flag, shared_settings
from megatron_llr.errors import input_error
from megatron_llr.matrices.index import build_matrix_index
from megatron_llr.matrices.info import MatrixIndex
from megatron_llr.matrices.shard import MatrixShard
from megatron_llr.megatron import versions
from megatron_llr.megatron.catalog import (
    VOCABULARY,
    build_catalog,
    require_known,
    without_padding,
)
from megatron_llr.megatron.stepped_tensors import (
    inner_optimizers,
    leaf_optimizers,
    stepped_domains,
)
from megatron_llr.param_groups.layer_groups import LayerGroups
from megatron_llr.policies import acts_on, read_role_table
from megatron_llr.policy_table import WEIGHT_DECAY
from megatron_llr.ranks import gather_distinct, gather_objects, require_equal, together

_ATTRIBUTE = "llr"
"""Attribute of the optimizer that holds its `Assembly`."""

UNSTEPPABLE: Mapping[str, str] = {
    "optimizer_cpu_offload": "its CPU copies are stepped by optimizers that it may rebuild",
    "optimizer_cuda_graph": "layer groups use Python hooks, which a graph records only once",
    "overlap_param_gather_with_optimizer_step": "it steps model chunks one by one during gathers",
}
"""Settings of Megatron's OptimizerConfig that layer groups do not work with -> why."""


@dataclass(frozen=True, eq=False)
class NamedWeights:
    """The weights of this rank by matrix id, from one walk over the model.

    Attributes:
        config: settings that all ranks agree on.
        model_chunks: the model.
        padded_shards: this rank's parts, including rows that pad the vocabulary: they are
            initialized and stepped like the rest.
        shards: the same without those rows: the parts that are measured and logged.
        matrix_index: every logical matrix of the job.
    """

    config: LLRConfig
    model_chunks: list[torch.nn.Module]
    padded_shards: tuple[MatrixShard, ...]
    shards: tuple[MatrixShard, ...]
    matrix_index: MatrixIndex


@dataclass(frozen=True, eq=False)
class Assembly:
    """An optimizer's layer groups, and the weights that they step.

    Attributes:
        weights: the weights by matrix id.
        layer_groups: the layer groups of this rank's inner optimizers.
        inseparable: matrices that share their parameter's multiplier, because an optimizer cannot
            step parts of a tensor; the same on every rank.
    """

    weights: NamedWeights
    layer_groups: LayerGroups
    inseparable: frozenset[str]


def say(line: str) -> None:
    """Print a line of the extension on rank 0."""
    print_rank_0(f"[llr] {line}")


def require_same_settings(config: LLRConfig, **others: Any) -> None:
    """Check that every rank was given the same. Enter on all ranks, before anything else.

    Args:
        config: settings of the extension; the log folder may differ.
        others: Megatron's settings by the names of their flags, with underscores.

    Raises:
        ValueError: if the file of `--llr-role-table` cannot be read.
        RuntimeError: naming the first setting that differs, its values and the ranks.
    """
    settings = shared_settings(config)
    settings |= {f"--{name.replace('_', '-')}": value for name, value in others.items()}
    settings |= {"the version of torch": torch.__version__, **versions.versions()}
    require_equal(settings, lambda setting: f"give every rank the same {setting}")
    table = config.role_table
    if table is not None:
        # The path is the same on every rank; the file there may differ.
        contents = together(lambda: read_role_table(table).content())
        require_equal(
            {f"the content of {flag('role_table')}": contents},
            lambda _: f"give every rank the same file {table}",
        )


def refuse_unsteppable(config: Any) -> None:
    """Refuse an OptimizerConfig with a setting of `UNSTEPPABLE`.

    Raises:
        ValueError: naming it.
    """
    for name, reason in UNSTEPPABLE.items():
        if getattr(config, name, False):
            raise input_error(
                f"OptimizerConfig({name}=True) is not supported yet: {reason}. It must be False: "
                f"leave it out (--{name.replace('_', '-')})."
            )


def name_weights(
    model_chunks: list[torch.nn.Module], config: LLRConfig, vocab_size: int | None
) -> NamedWeights:
    """Agree on the settings, then walk the model. Enter on all ranks.

    Args:
        model_chunks: as given to `get_megatron_optimizer`.
        config: settings of the extension.
        vocab_size: tokens of the vocabulary: rows of embedding and head that are not padding.

    Raises:
        ValueError: if a weight is not in the tables (without `--llr-skip-unknown`), no matrix can
            be tuned, or `vocab_size` is missing.
        RuntimeError: if settings differ between ranks, or weights are sharded in a way that is not
            supported (GTP, FSDP).
    """
    require_same_settings(config, vocab_size=vocab_size)
    catalog = together(lambda: build_catalog(model_chunks))
    unknown = sorted({name for names in gather_objects(catalog.unknown) for name in names})
    if not config.skip_unknown:
        require_known(unknown)
    elif unknown:
        say(f"unknown weights, trained at multiplier 1: {'; '.join(unknown)}")
    shards = without_padding(catalog.shards, vocab_size)
    matrix_index = build_matrix_index(shards)
    with_rows = [matrix for matrix in VOCABULARY if matrix in matrix_index]
    if vocab_size is None and with_rows:
        raise input_error(
            f"vocab_size is None, but it is needed for {' and '.join(with_rows)}, whose padding "
            "rows must not be measured. Give vocab_size=, the number of tokens of the tokenizer, "
            "together with llr."
        )
    return NamedWeights(config, model_chunks, catalog.shards, shards, matrix_index)


def _require_fp32_weights(groups: LayerGroups) -> None:
    """Refuse hyperball steps where no fp32 weights are stepped."""
    lacking = groups.without_fp32_weights
    if lacking:
        name, dtype = next(iter(lacking.items()))
        raise input_error(
            f"{flag('hyperball')} needs fp32 weights in the optimizer, and those of {name} are "
            f"{dtype}. With --use-precision-aware-optimizer they can be stepped only where "
            f"{flag('step')} fused is possible. Leave out that flag or {flag('hyperball')}."
        )


def assemble(optimizer: Any, weights: NamedWeights) -> None:
    """Build the layer groups of an optimizer and attach them to it. Enter on all ranks.

    Raises:
        ValueError: if the optimizer cannot have layer groups, or already has them.
    """
    config = weights.config
    for leaf in leaf_optimizers(optimizer):
        refuse_unsteppable(leaf.config)
    if hasattr(optimizer, _ATTRIBUTE):
        raise input_error(
            "This optimizer already has layer groups, and a second LLRConfig was given. Give one "
            "LLRConfig, either to get_megatron_optimizer or to add_layer_groups."
        )
    target = together(lambda: acts_on(config.policy))
    require_equal(
        {f"the quantity that {flag('policy')} {config.policy} acts on": target},
        lambda _: "give every rank the same function",
    )
    groups = together(
        lambda: LayerGroups(
            inner_optimizers(optimizer),
            weights.padded_shards,
            decoupled_decay=config.weight_decay == "decoupled",
            on_decay=target == WEIGHT_DECAY,
            step=config.step,
            domains=stepped_domains(optimizer) if config.hyperball else (),
        )
    )
    if config.hyperball:
        together(lambda: _require_fp32_weights(groups))
    inseparable: dict[str, str] = {}
    for reported in gather_distinct(groups.inseparable):
        inseparable.update(reported)
    if inseparable and config.granularity != "parameter":
        say(
            f"{', '.join(sorted(set(inseparable.values())))} cannot step parts of a tensor: "
            f"{len(inseparable)} fused matrices share the mean multiplier of their parameter"
        )
    setattr(optimizer, _ATTRIBUTE, Assembly(weights, groups, frozenset(inseparable)))


def assembly_of(optimizer: Any) -> Assembly:
    """The layer groups that `assemble` attached to an optimizer.

    Raises:
        ValueError: if it has none.
    """
    if not hasattr(optimizer, _ATTRIBUTE):
        raise input_error(
            f"This {type(optimizer).__name__} has no layer groups: it was built without llr. Build "
            "it with megatron_llr.get_megatron_optimizer(..., llr=LLRConfig(...)), or first call "
            "add_layer_groups(optimizer, model_chunks, llr)."
        )
    assembly: Assembly = getattr(optimizer, _ATTRIBUTE)
    return assembly
