"""The card and the versions that results name."""

from pathlib import Path

import torch


def gpu_and_versions(script: str) -> dict[str, str]:
    """Card, torch and triton; ends a program that needs a GPU where torch sees none.

    Args:
        script: `__file__` of the program.
    """
    if not torch.cuda.is_available():
        raise SystemExit(f"benchmarks/{Path(script).name} needs a GPU; torch sees none")
    import triton

    return {
        "card": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
    }
