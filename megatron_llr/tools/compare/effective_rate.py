"""The effective learning rate of a run, one number from its `learning_rates.csv`."""

import math
from pathlib import Path

from megatron_llr.matrices.ids import EMBEDDING_IDS, ROUTER
from megatron_llr.telemetry.read_logs import rates_by_role


def effective_rate_of(folder: Path) -> float | None:
    """Mean effective learning rate of a run's matrices; None if the run logged none.

    The effective rate of a matrix at an update is its learning rate, multiplier included, over the
    Frobenius norm of the whole matrix after the update. It is averaged over the matrices of a role
    and over the logged updates of the run, warmup and decay included (arithmetic means), then over
    the roles (geometric mean). Embedding, head and routers are left out.

    Args:
        folder: `--llr-log-dir` of the run.
    """
    try:
        by_role = rates_by_role(folder, "effective_learning_rate")
    except FileNotFoundError:
        return None
    means = [
        math.fsum(spread.mean for spread in updates.values()) / len(updates)
        for role, updates in by_role.items()
        if role not in EMBEDDING_IDS and role != ROUTER
    ]
    if not means or min(means) <= 0:
        return None
    return math.exp(math.fsum(map(math.log, means)) / len(means))
