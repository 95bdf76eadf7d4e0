"""Reads a grid from a YAML file and checks it."""

import math
import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path

from megatron_llr.errors import input_error, shown
from megatron_llr.tools.compare.command_flags import value_of
from megatron_llr.tools.compare.counterparts import with_counterparts
from megatron_llr.tools.compare.grid import (
    BATCH_FLAGS,
    SCRIPT,
    SENSITIVITY_FOLDER,
    Grid,
    Sensitivity,
)
from megatron_llr.tools.compare.grid_values import GridFile
from megatron_llr.yaml_file import read_yaml

_KEYS = {
    "out": "folder of the runs and of the report",
    "flags": "flags of all runs",
    "policies": "name -> flags of the policy",
    "learning_rates": "values of --lr",
    "iterations": "values of --train-iters, instead of that flag",
    "tokens": "training tokens, instead of iterations; rounded to whole updates",
    "seeds": "values of --seed",
    "control": "policy that the others are compared with (uniform)",
    "counterparts": "whether control policies are added for every esd policy (true)",
    "extend": "true, or the number of rates that may be added until the best is bracketed",
    "sensitivity": "factors on the rate of one role at a time, such as [0.7, 1.3]",
    "min_lr_ratio": "--min-lr divided by --lr (0.1)",
    "launch": "launcher, such as torchrun --nproc-per-node 8 (default: one Python process)",
    "script": "training script (pretrain_gpt_llr.py)",
    "gpus_per_run": "GPUs of one job when several run at a time; 0.25: four jobs share one",
    "jobs_per_gpu": "jobs that share a GPU, instead of gpus_per_run",
}
_NEEDED = ("out", "flags", "policies", "learning_rates", "seeds")
# Set by the grid for every run.
_OWN_FLAGS = (
    "--lr",
    "--min-lr",
    "--seed",
    "--tensorboard-dir",
    "--llr-log-dir",
    "--llr-role-factors",
    "--save",
    "--load",
)
# Part of the name of a folder, which may have 255 bytes.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
_RANKS = ("--nproc-per-node", "--nproc_per_node")
# Rates that `extend: true` may add for a policy and length.
_ADDED_RATES = 4
# Contexts of CUDA take about half a GB each: more jobs would leave no room for models.
_MOST_JOBS_PER_GPU = 32
_MOST_POLICIES = 200
_MOST_RUNS = 100_000


def read_grid(path: Path, out: Path | None = None) -> Grid:
    """Read and check a grid.

    Args:
        path: the YAML file.
        out: replaces `out` of the file.

    Raises:
        ValueError: if the file is not a valid grid.
    """
    file = _open(path)
    given = file.values
    flags = file.words(given["flags"], "flags")
    needed = (*BATCH_FLAGS, "--eval-iters")
    absent = [flag for flag in needed if value_of(flags, flag) is None]
    if absent:
        raise file.refused(f"flags without {', '.join(absent)}", f"flags with {', '.join(needed)}")
    for flag in BATCH_FLAGS:
        file.numbers([value_of(flags, flag)], int, flag, above_0=True)
    control = file.text(given.get("control", "uniform"), "control")
    policies = _policies(file, flags, control)
    launch = file.words(given.get("launch"), "launch")
    extend = given.get("extend", False)
    extend = _ADDED_RATES * extend if isinstance(extend, bool) else file.whole("extend", least=0)
    try:
        folder = out or Path(file.text(given["out"], "out")).expanduser()
    except RuntimeError as unknown_user:
        raise file.refused(
            f"out: {shown(given['out'])}", "the path of a folder there"
        ) from unknown_user
    grid = Grid(
        out=folder,
        flags=flags,
        policies=policies,
        learning_rates=file.numbers(given["learning_rates"], float, "learning_rates", above_0=True),
        iterations=_iterations(file, flags),
        seeds=file.numbers(given["seeds"], int, "seeds", above_0=False),
        control=control,
        min_lr_ratio=file.number("min_lr_ratio", 0.1),
        launch=launch,
        script=file.text(given.get("script", SCRIPT), "script"),
        gpus_per_run=_gpus_per_run(file, launch),
        extend=extend,
        sensitivity=_sweep(file, policies, control),
    )
    axes = (grid.policies, grid.learning_rates, grid.iterations, grid.seeds)
    if (runs := math.prod(map(len, axes))) > _MOST_RUNS:
        raise file.refused(f"{runs} runs", f"at most {_MOST_RUNS} runs")
    return grid


def _open(path: Path) -> GridFile:
    try:
        given = read_yaml(path)
    except ValueError as broken:
        raise input_error(
            f"Cannot read the grid {path}: {broken}. It must be a readable YAML file. Correct the "
            "path or the file."
        ) from broken
    if not isinstance(given, dict) or set(given) - set(_KEYS) or set(_NEEDED) - set(given):
        meanings = "; ".join(f"{key}: {meaning}" for key, meaning in _KEYS.items())
        got = shown(given)
        if isinstance(given, dict):
            others = ", ".join(shown(key) for key in given if key not in _KEYS)
            absent = ", ".join(key for key in _NEEDED if key not in given)
            got = f"the key {others}" if others else f"no {absent}"
        raise GridFile(path, {}).refused(
            got[:200], f"the keys {', '.join(_NEEDED)} and may have others of: {meanings}"
        )
    return GridFile(path, given)


def _policies(file: GridFile, flags: Sequence[str], control: str) -> dict[str, tuple[str, ...]]:
    """The policies of the file with their counterparts."""
    given = file.values["policies"]
    if not isinstance(given, dict):
        raise file.refused(f"policies: {shown(given)}", "a mapping from names to flags")
    if len(given) > _MOST_POLICIES:
        raise file.refused(f"{len(given)} policies", f"at most {_MOST_POLICIES} policies")
    names = {name: file.text(name, "policies") for name in given}
    policies = {names[n]: file.words(given[n], f"policies: {names[n]}") for n in given}
    for name, words in [("flags", flags), *policies.items()]:
        for flag in _OWN_FLAGS:
            if value_of(words, flag) is not None:
                raise file.refused(
                    f"{name}: {flag}", f"no {flag}, which the grid sets for every run"
                )
    bad = [name for name in policies if not _NAME.fullmatch(name) or name == SENSITIVITY_FOLDER]
    if bad or control not in policies or len(policies) < len(given):
        raise file.refused(
            f"policies {', '.join(map(shown, policies))}"[:500],
            f"distinct names of up to 200 letters, digits, . _ - other than {SENSITIVITY_FOLDER}, "
            f"and one of them must be the control {shown(control)}",
        )
    if not file.switch("counterparts", True):
        return policies
    try:
        return with_counterparts(policies, flags, control)
    except ValueError as conflict:
        allowed = "another name, the counterpart's flags, or counterparts: false"
        raise file.refused(conflict, allowed) from None


def _iterations(file: GridFile, flags: Sequence[str]) -> tuple[int, ...]:
    """Training lengths in updates, from one of `iterations`, `tokens` and `--train-iters`."""
    given = [key for key in ("iterations", "tokens") if key in file.values]
    in_flags = value_of(flags, "--train-iters")
    if len(given) + (in_flags is not None) != 1:
        names = [*given, *(["--train-iters in the flags"] if in_flags is not None else [])]
        raise file.refused(
            f"{' and '.join(names) or 'no training length'}",
            "one of iterations, tokens and --train-iters in the flags",
        )
    if in_flags is not None:
        return file.numbers([in_flags], int, "--train-iters", above_0=True)
    (key,) = given
    if key == "iterations":
        lengths = file.numbers(file.values[key], int, key, above_0=True)
    else:
        tokens = file.numbers(file.values[key], float, key, above_0=True)
        batch, length = (int(value_of(flags, flag) or 0) for flag in BATCH_FLAGS)
        lengths = tuple(max(1, round(value / (batch * length))) for value in tokens)
        if len(set(lengths)) < len(lengths):
            raise file.refused(
                f"{key}: {shown(file.values[key])}, or {shown(lengths)} updates of "
                f"{batch * length} tokens",
                "numbers of tokens that differ in whole updates",
            )
    if value_of(flags, "--lr-decay-iters") is not None:
        raise file.refused(
            f"{key} with --lr-decay-iters in the flags",
            "no --lr-decay-iters there, so that the rate decays over each length",
        )
    return tuple(sorted(lengths))


def _gpus_per_run(file: GridFile, launch: Sequence[str]) -> Fraction:
    """GPUs of one job: 0, a whole number, or 1/k."""
    if "jobs_per_gpu" in file.values:
        if "gpus_per_run" in file.values:
            raise file.refused("gpus_per_run and jobs_per_gpu", "one of the two")
        gpus = Fraction(1, file.whole("jobs_per_gpu", least=1))
    else:
        exact = file.number("gpus_per_run", 1)
        sharing = min(1 / exact, 1e6) if 0 < exact < 1 else 1
        # 0.33 is a third.
        if abs(round(sharing) - sharing) > 0.02 * sharing or (exact >= 1 and exact != int(exact)):
            raise file.refused(
                f"gpus_per_run: {exact:g}", "0, a whole number of GPUs, or 1 over a whole number"
            )
        gpus = Fraction(1, round(sharing)) if sharing > 1 else Fraction(int(exact))
    if gpus and gpus < Fraction(1, _MOST_JOBS_PER_GPU):
        raise file.refused(
            f"{1 / gpus} jobs on a GPU", f"at most {_MOST_JOBS_PER_GPU} jobs on a GPU"
        )
    ranks = next((value for flag in _RANKS if (value := value_of(launch, flag))), "1")
    if 0 < gpus < 1 and ranks != "1":
        raise file.refused(
            f"{gpus} GPU per run with {ranks} ranks on a node",
            "one rank per run to share a GPU, because NCCL needs a GPU for each rank",
        )
    return gpus


def _sweep(
    file: GridFile, policies: Mapping[str, tuple[str, ...]], control: str
) -> Sensitivity | None:
    """The sweep: a list of factors, or a mapping with factors, policy and roles."""
    given = file.values.get("sensitivity")
    if given is None:
        return None
    if not isinstance(given, dict):
        given = {"factors": given}
    unknown = set(given) - {"factors", "policy", "roles"}
    if unknown or "factors" not in given:
        raise file.refused(
            f"sensitivity: {shown(given)}",
            "there a list of factors, or a mapping with factors and perhaps policy and roles",
        )
    policy = file.text(given.get("policy", control), "sensitivity: policy")
    factors = file.numbers(given["factors"], float, "sensitivity", above_0=True)
    if 1 in factors or policy not in policies:
        raise file.refused(
            f"sensitivity: {shown(given)}",
            f"factors there other than 1, and a policy of {', '.join(policies)}"[:1000],
        )
    if value_of(policies[policy], "--llr-policy") == "alphadecay":
        raise file.refused(
            f"sensitivity around {policy}, which sets the weight decay",
            "a policy there that sets learning rates",
        )
    roles = file.words(given.get("roles"), "sensitivity: roles")
    if not all(map(_NAME.fullmatch, roles)) or len(set(roles)) < len(roles):
        raise file.refused(
            f"sensitivity: roles: {shown(list(roles))}",
            "distinct roles there, such as q, expert.up",
        )
    return Sensitivity(factors=tuple(sorted(factors)), policy=policy, roles=roles)
