"""A grid: policies x training lengths x learning rates x seeds, each run a list of flags."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from megatron_llr.tools.compare.command_flags import value_of

# In the folder that a grid is run from; otherwise the installed package's own is used.
SCRIPT = "pretrain_gpt_llr.py"
# Needed to convert iterations to tokens.
BATCH_FLAGS = ("--global-batch-size", "--seq-length")
# Every run starts from the weights of its seed and is evaluated on the same tokens.
_FAIR_FLAGS = ("--llr-same-start", "--llr-fixed-validation")
SENSITIVITY_FOLDER = "sensitivity"


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training job of a grid.

    Attributes:
        policy: name of the policy in the grid.
        iterations: updates, the value of `--train-iters`.
        learning_rate: value of `--lr`.
        seed: value of `--seed`.
        settings: all flags that determine what is trained, without the paths of this run.
        folder: holds its log, events, CSV files and `done.json`.
        title: its name in progress lines.
        role: the role whose rate is scaled, in a run of the sensitivity sweep; else empty.
        factor: what that rate is multiplied by.
    """

    policy: str
    iterations: int
    learning_rate: float
    seed: int
    settings: tuple[str, ...]
    folder: Path
    title: str
    role: str = ""
    factor: float = 1.0

    @property
    def digest(self) -> str:
        """Hash of the settings, which identifies them."""
        return hashlib.sha256(json.dumps(self.settings).encode()).hexdigest()[:16]

    def __str__(self) -> str:
        return self.title


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """A sweep that scales the learning rate of one role at a time.

    Attributes:
        factors: factors on the rate, other than 1.
        policy: the policy around which the rates are scaled, at its best learning rate.
        roles: the roles; empty for all that the policy's runs measured.
    """

    factors: tuple[float, ...]
    policy: str
    roles: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The contents of one YAML file (`README.md` in `examples/` has an example).

    Attributes:
        out: folder of the runs and of the report.
        flags: flags of all runs.
        policies: name -> flags.
        learning_rates: values of `--lr`.
        iterations: values of `--train-iters`, ascending.
        seeds: values of `--seed`.
        control: the policy that the others are compared with.
        min_lr_ratio: `--min-lr` over `--lr`.
        launch: words of the launcher; empty for one Python process.
        script: training script.
        gpus_per_run: GPUs of one job when several run at a time; 1/k if k jobs share a GPU.
        extend: learning rates that may be added per policy and length to bracket the best one.
        sensitivity: the sweep of roles, if any.
    """

    out: Path
    flags: tuple[str, ...]
    policies: Mapping[str, tuple[str, ...]]
    learning_rates: tuple[float, ...]
    iterations: tuple[int, ...]
    seeds: tuple[int, ...]
    control: str = "uniform"
    min_lr_ratio: float = 0.1
    launch: tuple[str, ...] = ()
    script: str = SCRIPT
    gpus_per_run: Fraction = Fraction(1)
    extend: int = 0
    sensitivity: Sensitivity | None = None

    @property
    def tokens_per_iteration(self) -> int:
        """Tokens of one update."""
        batch, length = (value_of(self.flags, flag) for flag in BATCH_FLAGS)
        return int(batch or 0) * int(length or 0)

    def base_runs(self) -> list[Run]:
        """Runs of the rates in the file, seed by seed, so that an unfinished grid already compares
        all policies.
        """
        return [
            self.run(policy, iterations, rate, seed)
            for seed in self.seeds
            for iterations in self.iterations
            for rate in self.learning_rates
            for policy in self.policies
        ]

    def run(
        self,
        policy: str,
        iterations: int,
        rate: float,
        seed: int,
        *,
        role: str = "",
        factor: float = 1.0,
    ) -> Run:
        """A run of the grid; with `role`, a run of the sensitivity sweep.

        Args:
            policy: name of the policy.
            iterations: value of `--train-iters`.
            rate: value of `--lr`.
            seed: value of `--seed`.
            role: the role whose rate is multiplied by `factor`.
            factor: see `role`.
        """
        chosen = self.policies[policy]
        settings = [*self.flags, *chosen, "--lr", f"{rate:g}"]
        settings += ["--min-lr", f"{rate * self.min_lr_ratio:g}", "--seed", str(seed)]
        if value_of([*self.flags, *chosen], "--llr-policy") == "random":
            # A different permutation for every seed: a single one could be good by chance.
            settings += ["--llr-random-seed", str(seed)]
        title = [policy]
        folder = self.out / policy
        if role:
            folder = self.out / SENSITIVITY_FOLDER / f"{role}-{factor:g}" / policy
            settings += ["--llr-role-factors", f"{role}={factor:g}"]
            title.append(f"{role} x {factor:g}")
        # Without `iterations` in the file, --train-iters is in the flags of all runs.
        if value_of(self.flags, "--train-iters") is None:
            settings += ["--train-iters", str(iterations)]
            folder /= f"iters-{iterations}"
            title.append(f"{iterations} updates")
        settings += [flag for flag in _FAIR_FLAGS if flag not in settings]
        return Run(
            policy=policy,
            iterations=iterations,
            learning_rate=rate,
            seed=seed,
            settings=tuple(settings),
            folder=folder / f"lr-{rate:g}" / f"seed-{seed}",
            title=", ".join([*title, f"lr {rate:g}", f"seed {seed}"]),
            role=role,
            factor=factor,
        )
