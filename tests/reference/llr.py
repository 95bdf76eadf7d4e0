"""LLR (arXiv 2605.22297) as in the paper, one matrix after another, in plain PyTorch.

Independent of the package, which is tested against it.
"""

import math

import torch


def hill_median(weight: torch.Tensor) -> float:
    """Tail exponent over the upper half of the spectrum of WᵀW (the paper's Hill estimator with
    k = n/2, counting the threshold among the terms as the official code does).
    """
    eigenvalues = torch.linalg.svdvals(weight.double()).square().sort().values
    start = int(len(eigenvalues) / 2)
    tail = eigenvalues[start:]
    return 1 + len(tail) / float((tail / tail[0]).log().sum())


def multipliers(
    weights: dict[str, torch.Tensor], s_min: float, s_max: float, embeddings: tuple[str, ...]
) -> tuple[dict[str, float], dict[str, float]]:
    """Exponent and multiplier of every matrix: s_min at the smallest exponent, s_max at the
    largest, linear between; embedding and head get s_max; fewer than 50 eigenvalues get 1.
    """
    alphas = {
        name: hill_median(weight)
        for name, weight in weights.items()
        if name not in embeddings and min(weight.shape) >= 50
    }
    low, high = min(alphas.values()), max(alphas.values())
    result = {
        name: s_min + (s_max - s_min) * (a - low) / (high - low) for name, a in alphas.items()
    }
    for name, weight in weights.items():
        if name not in result:
            result[name] = s_max if name in embeddings and min(weight.shape) >= 50 else 1.0
    return alphas, result


def adamw_rate(
    before: torch.Tensor,
    after: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    step: int,
    *,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> torch.Tensor:
    """The learning rate that an AdamW step used on every element, from its result:
    after = before - rate * (weight_decay * before + m / (sqrt(v) + eps)). fp64, shape of `before`.
    """
    m = exp_avg.double() / (1 - betas[0] ** step)
    v = exp_avg_sq.double() / (1 - betas[1] ** step)
    direction = weight_decay * before.double() + m / (v.sqrt() + eps)
    return (before.double() - after.double()) / direction


def adamw_rate_of(
    optimizer: torch.optim.Optimizer,
    tensor: torch.Tensor,
    before: torch.Tensor,
    decay_factor: float = 1.0,
) -> torch.Tensor:
    """`adamw_rate` of the last step on a tensor, from its state and param group.

    The weight decay is multiplied by a factor.
    """
    group = next(g for g in optimizer.param_groups if any(p is tensor for p in g["params"]))
    state = optimizer.state[tensor]
    return adamw_rate(
        before,
        tensor.detach(),
        state["exp_avg"],
        state["exp_avg_sq"],
        group["step"],
        betas=group["betas"],
        eps=group["eps"],
        weight_decay=group["weight_decay"] * decay_factor,
    )


def cosine(step: int, *, warmup: int, total: int, peak: float, low: float) -> float:
    """Megatron's cosine schedule: the rate of update `step`, from 1 (`OptimizerParamScheduler` with
    init_lr 0, after step - 1 scheduler steps).
    """
    done = step - 1
    if done <= warmup and warmup > 0:
        return peak * done / warmup
    progress = min(1.0, (done - warmup) / (total - warmup))
    return low + (peak - low) * 0.5 * (1 + math.cos(math.pi * progress))
