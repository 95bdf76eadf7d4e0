"""Which GPUs a job of a grid uses when several run at a time."""

import functools
import math
import os
import subprocess
from fractions import Fraction

from megatron_llr.errors import input_error


@functools.cache
def _present() -> int | None:
    """Number of GPUs of this machine; None if it cannot be determined."""
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return listed.stdout.count("GPU ") if listed.returncode == 0 else None


def gpus_of(slot: int, jobs: int, gpus_per_run: Fraction) -> list[str]:
    """Values of CUDA_VISIBLE_DEVICES for one of `jobs` jobs that run at a time.

    Args:
        slot: number of the job among them, from 0.
        jobs: number of jobs at a time.
        gpus_per_run: GPUs of each; 1/k if k jobs share one.

    Returns:
        Indices or names; none if jobs use no GPU or all GPUs are hidden.

    Raises:
        ValueError: if there are too few GPUs.
    """
    needed = math.ceil(jobs * gpus_per_run)
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if needed == 0:
        return []
    if given in ("", "-1"):
        return [given]
    present = _present() if given is None else None
    every = [str(index) for index in range(needed)] if given is None else given.split(",")
    available = len(every) if present is None else present
    if available < needed:
        source = f"CUDA_VISIBLE_DEVICES={given}" if given else f"This machine with {present} GPUs"
        raise input_error(
            f"{source} has too few GPUs: --jobs {jobs} with gpus_per_run {gpus_per_run} needs at "
            f"least {needed}. Lower --jobs or the grid's gpus_per_run (0 for jobs without a GPU, "
            "1/k for k jobs on a GPU)."
        )
    first = math.floor(slot * gpus_per_run)
    return every[first : first + math.ceil(gpus_per_run)]
