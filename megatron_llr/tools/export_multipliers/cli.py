"""The command line of `tools/export_multipliers.py`."""

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_llr.errors import input_error
from megatron_llr.output import and_more, refuse_existing, replaced_file

_DESCRIPTION = """Write the multipliers of one update of a run for use without this extension.

SOURCE is the log folder of a run (--llr-log-dir), or a torch_dist checkpoint: the folder given to
--save, or that of one iteration. The formats are

  role-table  a file for --llr-policy fixed --llr-role-table, YAML or JSON by the suffix of OUTPUT
  megatron    a Python module with config_overrides for Megatron's get_megatron_optimizer
  automodel   param_group_overrides of NeMo Automodel, YAML, for LLaMA-like models
  torchtitan  a Python module with PARAM_GROUPS of torchtitan's ParamGroupConfig

megatron and torchtitan have absolute learning rates, for --lr, --min-lr and --weight-decay. By
default these are the settings of the run, if SOURCE is a checkpoint.
"""
_FORMATS = ("role-table", "megatron", "automodel", "torchtitan")


def parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    made = argparse.ArgumentParser(
        description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("source", type=Path, help="log folder or checkpoint")
    made.add_argument("output", type=Path, help="the file to write, which must not exist")
    made.add_argument("--format", choices=_FORMATS, default="role-table", help="(role-table)")
    made.add_argument(
        "--iteration", type=int, help="a logged update, or a checkpoint's iteration (the last)"
    )
    made.add_argument("--lr", type=float, help="base learning rate")
    made.add_argument("--min-lr", type=float, help="smallest base learning rate")
    made.add_argument("--weight-decay", type=float, help="base weight decay")
    made.add_argument(
        "--decay",
        choices=("coupled", "decoupled"),
        help="--llr-weight-decay of a run whose logs are read (coupled); a checkpoint has it",
    )
    return made


def _run(given: argparse.Namespace) -> str:
    """Export; returns what to print."""
    refuse_existing(given.output)
    if not given.output.parent.is_dir():
        raise input_error(
            f"The folder of {given.output} does not exist. It must be one that can be written. "
            "Create it, or choose another output."
        )
    # torch takes long to import.
    from megatron_llr.tools.export_multipliers import formats, names, source

    if any(given.source.glob("learning_rates*.csv")):
        decoupled = given.decay == "decoupled"
        rates = source.read_logs(given.source, given.iteration, decoupled=decoupled)
    else:
        if given.decay is not None:
            raise input_error(
                f"--decay {given.decay} has no effect: {given.source} is not a log folder, and a "
                "checkpoint has this setting. Leave it out."
            )
        rates = source.read_checkpoint(given.source, given.iteration)
    if given.format == "role-table":
        export = formats.role_table(rates, as_yaml=given.output.suffix in (".yaml", ".yml"))
    else:
        _require_plain(given.format, rates.hyperball, names.is_hybrid(rates.multipliers))
        if given.format == "automodel":
            export = formats.automodel(rates)
        else:
            base = formats.BaseRates(
                *(_base(given, name, rates.base) for name in ("lr", "min_lr", "weight_decay"))
            )
            write = formats.megatron if given.format == "megatron" else formats.torchtitan
            export = write(rates, base)
    with replaced_file(given.output) as partial:
        partial.write_text(export.text, encoding="utf-8")
    lines = [
        f"{given.output}: multipliers of {rates.origin}",
        f"{len(rates.multipliers)} matrices, {export.groups} different settings",
    ]
    if export.merged:
        lines += ["fused parameters that have one rate, the mean weighted by size:"]
        lines += [f"  {line}" for line in export.merged]
    if export.left_out:
        lines.append(f"left out, without a name in this format: {and_more(export.left_out, 8)}")
    return "\n".join(lines)


def _require_plain(form: str, hyperball: bool, hybrid: bool) -> None:
    """Refuse what only this package can step, or name."""
    if hyperball:
        raise input_error(
            f"--format {form} cannot hold the rates of a run with --llr-hyperball, which are "
            "relative to the norms of matrices. It must be role-table for such a run."
        )
    if hybrid:
        raise input_error(
            f"--format {form} cannot name the layers of a hybrid model, whose blocks hold several. "
            "It must be role-table for such a model."
        )


def _base(given: argparse.Namespace, name: str, saved: Mapping[str, float]) -> float:
    """A base rate: the flag's, or that of the run."""
    flag = f"--{name.replace('_', '-')}"
    value = getattr(given, name)
    value = saved.get(name) if value is None else value
    if value is None or not (math.isfinite(value) and value >= 0):
        was = "missing" if value is None else f"{value}"
        raise input_error(
            f"{flag} is {was}. --format {given.format} has absolute rates and needs a finite "
            f"number of at least 0. Set {flag}, or export from a checkpoint, which has it."
        )
    return float(value)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    given = parser().parse_args(arguments)
    try:
        print(_run(given))
    except BrokenPipeError:
        raise
    except (ValueError, OSError) as failed:
        print(failed, file=sys.stderr)
        return 1
    return 0
