"""Settings of the pretraining script; the docstring of a field is the help text of its flag."""

from dataclasses import dataclass, field
from typing import Literal

from megatron_llr.config import START, check_choices

DeviceName = Literal["auto", "cuda", "cpu"]


@dataclass(frozen=True, kw_only=True)
class ScriptConfig:
    """The pretraining script: where it runs and how it starts."""

    dry_run: bool = field(default=False, metadata=START)
    """Print every matrix with its shape, owner and starting multiplier, then stop."""

    explain: str | None = field(default=None, metadata=START)
    """Id of a matrix, for instance block.3.attention.q. Before the first update, print why it has
    its learning rate: shards, exponent, policy, target, ramp, base learning rate, weight decay.
    With --llr-dry-run and --load, for the run that saved the checkpoint."""

    same_start: bool = field(default=False, metadata=START)
    """Initial weights that depend only on --seed: every matrix is drawn whole, so that a run on
    another layout begins at the same weights. Without it they are Megatron's own."""

    fixed_validation: bool = field(default=False, metadata=START)
    """Every evaluation on the same validation samples for every --seed: --eval-iters batches in a
    fixed order. Without it Megatron takes other samples each time."""

    device: DeviceName = field(default="auto", metadata=START)
    """Where the job runs: auto (cuda if there is a GPU), cuda or cpu."""

    def __post_init__(self) -> None:
        """Check every value; a wrong one is a ValueError that names its flag."""
        check_choices(self)
