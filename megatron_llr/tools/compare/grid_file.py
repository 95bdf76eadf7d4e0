"""Reads a grid from a YAML file and checks it."""

import math
import re
import shlex
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from megatron_llr.errors import input_error
from megatron_llr.tools.compare.command_flags import value_of
from megatron_llr.tools.compare.counterparts import with_counterparts
from megatron_llr.tools.compare.grid import (
    BATCH_FLAGS,
    SCRIPT,
    SENSITIVITY_FOLDER,
    Grid,
    Sensitivity,
)

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
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_RANKS = ("--nproc-per-node", "--nproc_per_node")
# Rates that `extend: true` may add for a policy and length.
_ADDED_RATES = 4
# Contexts of CUDA take about half a GB each: more jobs would leave no room for models.
_MOST_JOBS_PER_GPU = 32


class _File:
    """The keys of one YAML file, each checked as it is read."""

    def __init__(self, path: Path, values: Mapping[str, Any]) -> None:
        self.path, self.values = path, values

    def refused(self, got: object, allowed: str) -> ValueError:
        """The error for one key."""
        return input_error(
            f"The grid {self.path} has {got}. It must have {allowed}. Correct the file."
        )

    def words(self, text: Any, key: str) -> tuple[str, ...]:
        """Flags given as one string or as a list of words; none if absent."""
        if text is None:
            return ()
        if isinstance(text, str):
            return tuple(shlex.split(text, comments=True))
        if isinstance(text, Sequence) and not isinstance(text, bytes):
            return tuple(str(word) for word in text)
        raise self.refused(f"{key}: {text!r}", "flags in one string or in a list of words")

    def numbers(self, values: Any, kind: type, key: str, *, above_0: bool) -> tuple[Any, ...]:
        """Distinct numbers; floats must differ in the six digits that a folder is named with."""
        try:
            # YAML 1.1 reads 1e-3 as a string.
            numbers = tuple(kind(value) for value in values)
        except (TypeError, ValueError, OverflowError):
            numbers = ()
        if not numbers or len(set(numbers)) < len(numbers) or (above_0 and not min(numbers) > 0):
            allowed = "a list of distinct numbers there" + (", all above 0" if above_0 else "")
            raise self.refused(f"{key}: {values!r}", allowed)
        if kind is float and len({f"{value:g}" for value in numbers}) < len(numbers):
            raise self.refused(f"{key}: {values!r}", "values that differ in their first six digits")
        return numbers

    def number(self, key: str, default: float) -> float:
        """A finite number from 0."""
        value = self.values.get(key, default)
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = -1
        if not 0 <= number < math.inf:
            raise self.refused(f"{key}: {value!r}", "a number there, 0 or more")
        return number

    def whole(self, key: str, *, least: int) -> int:
        """A whole number."""
        number = self.number(key, least)
        if number != int(number) or number < least:
            raise self.refused(
                f"{key}: {self.values[key]!r}", f"a whole number there, {least} or more"
            )
        return int(number)


def read_grid(path: Path, out: Path | None = None) -> Grid:
    """Read and check a grid.

    Args:
        path: the YAML file.
        out: replaces `out` of the file.

    Raises:
        ValueError: if the file is not a valid grid.
        ImportError: if PyYAML is not installed.
    """
    file = _open(path)
    given = file.values
    flags = file.words(given["flags"], "flags")
    needed = (*BATCH_FLAGS, "--eval-iters")
    absent = [flag for flag in needed if value_of(flags, flag) is None]
    if absent:
        raise file.refused(f"flags without {', '.join(absent)}", f"flags with {', '.join(needed)}")
    control = str(given.get("control", "uniform"))
    policies = _policies(file, flags, control)
    launch = file.words(given.get("launch"), "launch")
    extend = given.get("extend", False)
    extend = _ADDED_RATES * extend if isinstance(extend, bool) else file.whole("extend", least=0)
    return Grid(
        out=out or Path(str(given["out"])).expanduser(),
        flags=flags,
        policies=policies,
        learning_rates=file.numbers(given["learning_rates"], float, "learning_rates", above_0=True),
        iterations=_iterations(file, flags),
        seeds=file.numbers(given["seeds"], int, "seeds", above_0=False),
        control=control,
        min_lr_ratio=file.number("min_lr_ratio", 0.1),
        launch=launch,
        script=str(given.get("script", SCRIPT)),
        gpus_per_run=_gpus_per_run(file, launch),
        extend=extend,
        sensitivity=_sweep(file, policies, control),
    )


def _open(path: Path) -> _File:
    try:
        import yaml
    except ImportError as missing:
        raise ImportError("Grids need PyYAML: pip install 'megatron-llr[compare]'") from missing
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as broken:
        raise input_error(
            f"Cannot read the grid {path}: {type(broken).__name__}: {broken}. It must be a "
            "readable YAML file. Correct the path or the file."
        ) from broken
    if not isinstance(given, dict) or set(given) - set(_KEYS) or set(_NEEDED) - set(given):
        meanings = "; ".join(f"{key}: {meaning}" for key, meaning in _KEYS.items())
        got = f"keys {sorted(map(str, given))}" if isinstance(given, dict) else repr(given)
        raise _File(path, {}).refused(
            got, f"the keys {', '.join(_NEEDED)} and may have others of: {meanings}"
        )
    return _File(path, given)


def _policies(file: _File, flags: Sequence[str], control: str) -> dict[str, tuple[str, ...]]:
    """The policies of the file with their counterparts."""
    given = file.values["policies"]
    if not isinstance(given, dict):
        raise file.refused(f"policies: {given!r}", "a mapping from names to flags")
    policies = {str(name): file.words(text, f"policies: {name}") for name, text in given.items()}
    for name, words in [("flags", flags), *policies.items()]:
        for flag in _OWN_FLAGS:
            if value_of(words, flag) is not None:
                raise file.refused(
                    f"{name}: {flag}", f"no {flag}, which the grid sets for every run"
                )
    bad = [name for name in policies if not _NAME.fullmatch(name) or name == SENSITIVITY_FOLDER]
    if bad or control not in policies:
        raise file.refused(
            f"policies {', '.join(policies)}",
            f"names of letters, digits, . _ - other than {SENSITIVITY_FOLDER}, and one of them "
            f"must be the control {control!r}",
        )
    if not file.values.get("counterparts", True):
        return policies
    try:
        return with_counterparts(policies, flags, control)
    except ValueError as conflict:
        allowed = "another name, the counterpart's flags, or counterparts: false"
        raise file.refused(conflict, allowed) from None


def _iterations(file: _File, flags: Sequence[str]) -> tuple[int, ...]:
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
                f"{key}: {file.values[key]!r}, or {lengths} updates of {batch * length} tokens",
                "numbers of tokens that differ in whole updates",
            )
    if value_of(flags, "--lr-decay-iters") is not None:
        raise file.refused(
            f"{key} with --lr-decay-iters in the flags",
            "no --lr-decay-iters there, so that the rate decays over each length",
        )
    return tuple(sorted(lengths))


def _gpus_per_run(file: _File, launch: Sequence[str]) -> Fraction:
    """GPUs of one job: 0, a whole number, or 1/k."""
    if "jobs_per_gpu" in file.values:
        if "gpus_per_run" in file.values:
            raise file.refused("gpus_per_run and jobs_per_gpu", "one of the two")
        gpus = Fraction(1, file.whole("jobs_per_gpu", least=1))
    else:
        exact = file.number("gpus_per_run", 1)
        sharing = 1 / exact if 0 < exact < 1 else 1
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
    file: _File, policies: Mapping[str, tuple[str, ...]], control: str
) -> Sensitivity | None:
    """The sweep: a list of factors, or a mapping with factors, policy and roles."""
    given = file.values.get("sensitivity")
    if given is None:
        return None
    if not isinstance(given, dict):
        given = {"factors": given}
    unknown = sorted(set(given) - {"factors", "policy", "roles"})
    if unknown or "factors" not in given:
        raise file.refused(
            f"sensitivity: {given!r}",
            "there a list of factors, or a mapping with factors and perhaps policy and roles",
        )
    policy = str(given.get("policy", control))
    factors = file.numbers(given["factors"], float, "sensitivity", above_0=True)
    if 1 in factors or policy not in policies:
        raise file.refused(
            f"sensitivity: {given!r}",
            f"factors there other than 1, and a policy of {', '.join(policies)}",
        )
    if value_of(policies[policy], "--llr-policy") == "alphadecay":
        raise file.refused(
            f"sensitivity around {policy}, which sets the weight decay",
            "a policy there that sets learning rates",
        )
    return Sensitivity(
        factors=tuple(sorted(factors)),
        policy=policy,
        roles=file.words(given.get("roles"), "sensitivity: roles"),
    )
