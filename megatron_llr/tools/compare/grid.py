"""A grid from one YAML file: policies x learning rates x seeds, each a list of flags."""

import hashlib
import json
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_llr.errors import input_error
from megatron_llr.tools.compare.counterparts import with_counterparts
from megatron_llr.tools.compare.flags import value_of

_KEYS = {
    "out": "folder of the runs and of the report",
    "flags": "flags of all runs",
    "policies": "name -> flags of the policy",
    "learning_rates": "values of --lr",
    "seeds": "values of --seed",
    "control": "policy that the others are compared with (uniform)",
    "counterparts": "whether control policies are added for every esd policy (true)",
    "min_lr_ratio": "--min-lr divided by --lr (0.1)",
    "launch": "launcher, such as torchrun --nproc-per-node 8 (default: one Python process)",
    "script": "training script (pretrain_gpt_llr.py)",
    "gpus_per_run": "GPUs of one job, when several run at a time on one node",
}
_NEEDED = ("out", "flags", "policies", "learning_rates", "seeds")
# Needed to convert iterations to tokens, and to have an evaluation curve.
_NEEDED_FLAGS = ("--global-batch-size", "--seq-length", "--train-iters", "--eval-iters")
# Every run starts from the weights of its seed and is evaluated on the same tokens.
_FAIR_FLAGS = ("--llr-same-start", "--llr-fixed-validation")
# Set by the grid for every run.
_OWN_FLAGS = (
    "--lr",
    "--min-lr",
    "--seed",
    "--tensorboard-dir",
    "--llr-log-dir",
    "--save",
    "--load",
)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class Run:
    """One training job of a grid.

    Attributes:
        policy: name of the policy in the grid.
        learning_rate: value of `--lr`.
        seed: value of `--seed`.
        settings: all flags that determine what is trained, without the paths of this run.
        folder: holds its log, events, CSV files and `done.json`.
    """

    policy: str
    learning_rate: float
    seed: int
    settings: tuple[str, ...]
    folder: Path

    @property
    def digest(self) -> str:
        """Hash of the settings, which identifies them."""
        return hashlib.sha256(json.dumps(self.settings).encode()).hexdigest()[:16]

    def __str__(self) -> str:
        return f"{self.policy}, lr {self.learning_rate:g}, seed {self.seed}"


@dataclass(frozen=True)
class Grid:
    """The contents of one YAML file (`README.md` in `examples/` has an example)."""

    out: Path
    flags: tuple[str, ...]
    policies: Mapping[str, tuple[str, ...]]
    learning_rates: tuple[float, ...]
    seeds: tuple[int, ...]
    control: str
    min_lr_ratio: float
    launch: tuple[str, ...]
    script: str
    gpus_per_run: int

    @property
    def tokens_per_iteration(self) -> int:
        """Tokens of one update."""
        batch, length = (value_of(self.flags, flag) for flag in _NEEDED_FLAGS[:2])
        return int(batch or 0) * int(length or 0)

    def runs(self) -> list[Run]:
        """All runs, seed by seed, so that an unfinished grid already compares all policies."""
        return [
            self._run(policy, rate, seed)
            for seed in self.seeds
            for rate in self.learning_rates
            for policy in self.policies
        ]

    def _run(self, policy: str, rate: float, seed: int) -> Run:
        chosen = self.policies[policy]
        settings = [*self.flags, *chosen, "--lr", f"{rate:g}"]
        settings += ["--min-lr", f"{rate * self.min_lr_ratio:g}", "--seed", str(seed)]
        if value_of([*self.flags, *chosen], "--llr-policy") == "random":
            # A different permutation for every seed: a single one could be good by chance.
            settings += ["--llr-random-seed", str(seed)]
        settings += [flag for flag in _FAIR_FLAGS if flag not in settings]
        folder = self.out / policy / f"lr-{rate:g}" / f"seed-{seed}"
        return Run(policy, rate, seed, tuple(settings), folder)


def _wrong(path: Path, got: object, allowed: str) -> ValueError:
    return input_error(f"The grid {path} has {got}. It must have {allowed}. Correct the file.")


def _words(text: Any, path: Path, key: str) -> tuple[str, ...]:
    """Flags given as one string or as a list of words; none if absent."""
    if text is None:
        return ()
    if isinstance(text, str):
        return tuple(shlex.split(text, comments=True))
    if isinstance(text, Sequence) and not isinstance(text, bytes):
        return tuple(str(word) for word in text)
    raise _wrong(path, f"{key}: {text!r}", "flags in one string or in a list of words")


def _numbers(values: Any, kind: type, path: Path, key: str) -> tuple[Any, ...]:
    try:
        # YAML 1.1 reads 1e-3 as a string.
        numbers = tuple(kind(value) for value in values)
    except (TypeError, ValueError):
        numbers = ()
    if not numbers or len(set(numbers)) < len(numbers) or (kind is float and min(numbers) <= 0):
        raise _wrong(
            path, f"{key}: {values!r}", "a list of distinct numbers there, learning rates above 0"
        )
    if kind is float and len({f"{value:g}" for value in numbers}) < len(numbers):
        raise _wrong(path, f"{key}: {values!r}", "rates that differ in their first six digits")
    return numbers


def _number(value: Any, kind: type, path: Path, key: str) -> Any:
    try:
        number = kind(value)
    except (TypeError, ValueError):
        number = -1
    if not 0 <= number < math.inf:
        raise _wrong(path, f"{key}: {value!r}", "a number there, 0 or more")
    return number


def read_grid(path: Path, out: Path | None = None) -> Grid:
    """Read and check a grid.

    Args:
        path: the YAML file.
        out: replaces `out` of the file.

    Raises:
        ValueError: if the file is not a valid grid.
        ImportError: if PyYAML is not installed.
    """
    try:
        import yaml
    except ImportError as missing:
        raise ImportError("Grids need PyYAML: pip install 'megatron-llr[compare]'") from missing
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as broken:
        raise input_error(
            f"Cannot read the grid {path}: {type(broken).__name__}: {broken}. It must be a "
            "readable YAML file. Correct the path or the file."
        ) from broken
    if not isinstance(given, dict) or set(given) - set(_KEYS) or set(_NEEDED) - set(given):
        meanings = "; ".join(f"{key}: {meaning}" for key, meaning in _KEYS.items())
        got = f"keys {sorted(map(str, given))}" if isinstance(given, dict) else repr(given)
        raise _wrong(path, got, f"the keys {', '.join(_NEEDED)} and may have others of: {meanings}")
    flags = _words(given["flags"], path, "flags")
    absent = [flag for flag in _NEEDED_FLAGS if value_of(flags, flag) is None]
    if absent:
        raise _wrong(
            path, f"flags without {', '.join(absent)}", f"flags with {', '.join(_NEEDED_FLAGS)}"
        )
    if not isinstance(given["policies"], dict):
        raise _wrong(path, f"policies: {given['policies']!r}", "a mapping from names to flags")
    policies = {
        str(name): _words(text, path, f"policies: {name}")
        for name, text in given["policies"].items()
    }
    for name, words in [("flags", flags), *policies.items()]:
        for flag in _OWN_FLAGS:
            if value_of(words, flag) is not None:
                raise _wrong(
                    path, f"{name}: {flag}", f"no {flag}, which the grid sets for every run"
                )
    bad = [name for name in policies if not _NAME.fullmatch(name)]
    control = str(given.get("control", "uniform"))
    if bad or control not in policies:
        allowed = f"names of letters, digits, . _ - and one of them must be the control {control!r}"
        raise _wrong(path, f"policies {', '.join(policies)}", allowed)
    if given.get("counterparts", True):
        try:
            policies = with_counterparts(policies, flags, control)
        except ValueError as conflict:
            allowed = "another name, the counterpart's flags, or counterparts: false"
            raise _wrong(path, conflict, allowed) from None
    return Grid(
        out=out or Path(str(given["out"])).expanduser(),
        flags=flags,
        policies=policies,
        learning_rates=_numbers(given["learning_rates"], float, path, "learning_rates"),
        seeds=_numbers(given["seeds"], int, path, "seeds"),
        control=control,
        min_lr_ratio=_number(given.get("min_lr_ratio", 0.1), float, path, "min_lr_ratio"),
        launch=_words(given.get("launch"), path, "launch"),
        script=str(given.get("script", "pretrain_gpt_llr.py")),
        gpus_per_run=_number(given.get("gpus_per_run", 1), int, path, "gpus_per_run"),
    )
