"""The exported files: role tables, overrides for Megatron and NeMo Automodel, torchtitan groups."""

import inspect
import json
import pprint
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import megatron_llr
from megatron_llr.config import flag
from megatron_llr.matrices.ids import ROUTER, MatrixId
from megatron_llr.policies.role_table import TableRow
from megatron_llr.tools.export_multipliers.names import megatron_parameters, name_pattern
from megatron_llr.tools.export_multipliers.source import ExportedRates

_TEMPLATE = Path(inspect.getfile(megatron_llr)).parent / "megatron" / "override_template.py"
_TABLE_MARK = "OVERRIDES: dict[str, dict[str, float]] = {}\n"


@dataclass(frozen=True)
class BaseRates:
    """What absolute rates refer to: Megatron's `--lr`, `--min-lr` and `--weight-decay`."""

    lr: float
    min_lr: float
    weight_decay: float


@dataclass(frozen=True)
class Export:
    """An exported file.

    Attributes:
        text: its content.
        groups: number of distinct settings.
        merged: lines on fused parameters, one rate each, whose matrices differ.
        left_out: matrices that the format cannot name and whose factors are not 1.
    """

    text: str
    groups: int
    merged: Sequence[str] = ()
    left_out: Sequence[str] = ()


def _settings(rates: ExportedRates, matrices: Sequence[MatrixId]) -> tuple[float, float]:
    """Factors on learning rate and weight decay of one param group that holds these matrices.

    Means weighted by size; the second is relative to the learning rate of the group, as AdamW
    multiplies the decay by it.
    """
    values = [(rates.multipliers[matrix], rates.decay(matrix)) for matrix in matrices]
    if all(value == values[0] for value in values):
        multiplier, decay = values[0]
    else:
        sizes = [rates.sizes.get(matrix, 1) for matrix in matrices]
        multiplier, decay = (
            sum(value[index] * size for value, size in zip(values, sizes, strict=True)) / sum(sizes)
            for index in (0, 1)
        )
    if multiplier == 0 or decay == multiplier:
        return multiplier, 1.0
    return multiplier, decay / multiplier


def header(rates: ExportedRates) -> str:
    """What a file holds, in a line."""
    return f"Multipliers of {rates.origin}, exported by megatron-llr {megatron_llr.__version__}."


def _mode(rates: ExportedRates) -> str:
    """The kind of weight decay that a role table was used with."""
    return f"For {flag('weight_decay')} {'decoupled' if rates.decoupled else 'coupled'}."


def role_table(rates: ExportedRates, *, as_yaml: bool) -> Export:
    """A file for `--llr-role-table`: a row per role where its matrices agree, else per matrix."""
    by_role: dict[str, dict[MatrixId, TableRow]] = defaultdict(dict)
    for matrix in rates.multipliers:
        row = rates.row(matrix)
        # Without --llr-router policy a table may not name routers.
        if matrix.role != ROUTER or row != TableRow():
            by_role[matrix.role][matrix] = row
    single = {role: rows for role, rows in by_role.items() if len(set(rows.values())) == 1}
    content = {
        str(matrix): row.content()
        for role, rows in by_role.items()
        if role not in single
        for matrix, row in rows.items()
    }
    content |= {role: next(iter(rows.values())).content() for role, rows in single.items()}
    groups = len({row for rows in by_role.values() for row in rows.values()})
    if not as_yaml:
        return Export(json.dumps(content, indent=1) + "\n", groups)
    return Export(_yaml(f"{header(rates)}\n# {_mode(rates)}", content), groups)


def _yaml(comment: str, content: object) -> str:
    import yaml

    dumped: str = yaml.safe_dump(content, sort_keys=False, default_flow_style=None, width=100)
    return f"# {comment}\n{dumped}"


def _patterns(
    rates: ExportedRates, dialect: str
) -> tuple[dict[tuple[float, float], list[str]], list[str]]:
    """Factors -> patterns of the weights that have them; and the matrices without a name."""
    groups: dict[tuple[float, float], list[str]] = defaultdict(list)
    left_out = []
    for matrix in rates.multipliers:
        settings = _settings(rates, [matrix])
        pattern = name_pattern(matrix, dialect)
        if settings == (1.0, 1.0):
            continue
        if pattern is None:
            left_out.append(str(matrix))
        else:
            groups[settings].append(pattern)
    return groups, left_out


def automodel(rates: ExportedRates) -> Export:
    """`param_group_overrides` of an optimizer of NeMo Automodel, for LLaMA-like models."""
    groups, left_out = _patterns(rates, "automodel")
    overrides = [
        {"pattern": "|".join(patterns), "lr_mult": multiplier, "wd_mult": decay}
        for (multiplier, decay), patterns in groups.items()
    ]
    text = _yaml(header(rates), {"param_group_overrides": overrides})
    return Export(text, len(groups), left_out=left_out)


def torchtitan(rates: ExportedRates, base: BaseRates) -> Export:
    """`param_groups` of torchtitan's `OptimizersContainer.Config`; the last group is the rest."""
    groups, left_out = _patterns(rates, "torchtitan")
    lines = [f'"""{header(rates)}', "", _base_line(base), '"""', ""]
    lines += ["from torchtitan.components.optimizer import ParamGroupConfig", ""]
    lines += ["# Settings of all groups; edit them here.", 'BASE = {"betas": (0.9, 0.95)}', ""]
    lines += ["PARAM_GROUPS = ["]
    rest = ((1.0, 1.0), [".*"])
    for (multiplier, decay), patterns in (*groups.items(), rest):
        kwargs = f'"lr": {base.lr * multiplier!r}, "weight_decay": {base.weight_decay * decay!r}'
        lines += [
            "    ParamGroupConfig(",
            f"        pattern={'|'.join(patterns)!r},",
            '        optimizer_name="AdamW",',
            f"        optimizer_kwargs={{**BASE, {kwargs}}},",
            "    ),",
        ]
    return Export("\n".join([*lines, "]", ""]), len(groups) + 1, left_out=left_out)


def megatron(rates: ExportedRates, base: BaseRates) -> Export:
    """A module with `config_overrides` for Megatron's `get_megatron_optimizer`.

    Megatron's override has no multiplier: `max_lr` and `min_lr` are absolute. They are part of the
    identity of a param group, so that groups of equal values are one and a matrix with the base's
    values has no override.
    """
    parameters = megatron_parameters(rates.multipliers)
    overrides: dict[str, Mapping[str, float]] = {}
    merged = []
    for name, matrices in parameters:
        multiplier, decay = _settings(rates, matrices)
        if len({(rates.multipliers[m], rates.decay(m)) for m in matrices}) > 1:
            parts = ", ".join(f"{m.weight} {rates.multipliers[m]:.4g}" for m in matrices)
            merged.append(f"{name}: {multiplier:.4g} (mean of {parts}), decay {decay:.4g}")
        override = {} if decay == 1.0 else {"wd_mult": decay}
        if (multiplier * base.lr, multiplier * base.min_lr) != (base.lr, base.min_lr):
            override |= {"max_lr": multiplier * base.lr, "min_lr": multiplier * base.min_lr}
        if override:
            overrides[name] = override
    named = {matrix for parameter in parameters for matrix in parameter.matrices}
    left_out = [
        str(m) for m in rates.multipliers if m not in named and _settings(rates, [m]) != (1.0, 1.0)
    ]
    template = _TEMPLATE.read_text(encoding="utf-8")
    assert template.count(_TABLE_MARK) == 1
    table = f"OVERRIDES: dict[str, dict[str, float]] = {pprint.pformat(overrides, width=96)}\n"
    text = f"# {header(rates)}\n# {_base_line(base)}\n{template.replace(_TABLE_MARK, table)}"
    groups = len({tuple(sorted(override.items())) for override in overrides.values()})
    return Export(text, groups, merged, left_out)


def _base_line(base: BaseRates) -> str:
    return f"For --lr {base.lr} --min-lr {base.min_lr} --weight-decay {base.weight_decay}."
