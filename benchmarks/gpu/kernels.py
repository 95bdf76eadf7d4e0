"""The fused step, hyperball steps, and the sums of a logged step."""

from importlib.util import find_spec
from typing import Any

from benchmarks import hyperball_step, logged_step, optimizer_step

_TINY = (2, 64, 96, 4)


def time_inner_steps(device: str, *, model: str, repeats: int = 20) -> dict[str, Any]:
    """Time the inner optimizer's step with a learning rate per matrix and with one rate.

    Args:
        device: cuda.
        model: a key of `optimizer_step.MODELS`.
        repeats: timed steps.

    Returns:
        What `optimizer_step.time_steps_of` returns, by the package of the optimizer: torch, te.
    """
    assert device == "cuda", "needs a GPU"
    packages = ["torch", *(["te"] if find_spec("transformer_engine") is not None else [])]
    return {name: optimizer_step.time_steps_of(model, repeats, name) for name in packages}


def time_hyperball_steps(device: str, *, model: str, repeats: int = 20) -> dict[str, Any]:
    """Time the inner optimizer's step with hyperball steps of all matrices, and its plain step.

    Args:
        device: cuda, or cpu for a dry run.
        model: a key of `optimizer_step.MODELS`, or tiny.
        repeats: timed steps.

    Returns:
        What `hyperball_step.time_hyperball_steps_of` returns.
    """
    shape = _TINY if model == "tiny" else optimizer_step.MODELS[model]
    return hyperball_step.time_hyperball_steps_of(shape, repeats, device)


def time_logged_step(device: str, *, model: str, repeats: int = 20) -> dict[str, Any]:
    """Time what a logged step adds to a training step.

    Args:
        device: cuda.
        model: a key of `optimizer_step.MODELS`.
        repeats: timed steps.

    Returns:
        What `logged_step.time_logs_of` returns.
    """
    assert device == "cuda", "needs a GPU"
    return logged_step.time_logs_of(model, repeats)
