"""AdamH in plain PyTorch, written from the formula, for a model with separate parameters."""

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch


def unit(matrix: torch.Tensor) -> torch.Tensor:
    """N(x) = x / |x|_F in fp64, N(0) = 0."""
    norm = matrix.double().norm()
    return matrix.double() / norm if norm > 0 else torch.zeros_like(matrix, dtype=torch.float64)


def step(
    weight: torch.Tensor, direction: torch.Tensor, rate: float, radius: torch.Tensor
) -> torch.Tensor:
    """R N(W - rate R N(u)) in fp64."""
    return radius * unit(weight.double() - rate * radius * unit(direction))


class Adam:
    """Adam's direction of one parameter: m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)."""

    def __init__(self, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8) -> None:
        self._betas, self._eps = betas, eps
        self._steps = 0
        self._moments: tuple[Any, Any] = (0.0, 0.0)

    def direction(self, gradient: torch.Tensor) -> torch.Tensor:
        """Of the next step."""
        (b1, b2), (m, v) = self._betas, self._moments
        self._steps += 1
        m, v = b1 * m + (1 - b1) * gradient, b2 * v + (1 - b2) * gradient.square()
        self._moments = (m, v)
        corrected = v / (1 - b2**self._steps)
        return m / (1 - b1**self._steps) / (corrected.sqrt() + self._eps)


def train(
    model: Any,
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    rates: Callable[[int], tuple[float, float, Mapping[str, float]]],
    names: Mapping[str, str],
    plain: Collection[str],
    *,
    weight_decay: float,
    clip: float,
) -> None:
    """AdamH on the matrices, AdamW on the rest.

    Args:
        model: changed in place.
        batches: tokens and labels of every update, [batch, sequence].
        rates: update from 1 -> (base rate, hyperball rate, matrix id -> multiplier).
        names: matrix id -> parameter name.
        plain: ids of matrices that AdamW steps.
        weight_decay: of the plain matrices; norms have none.
        clip: largest norm of all gradients together.
    """
    parameters = dict(model.named_parameters())
    matrix_of = {name: matrix for matrix, name in names.items()}
    adam = {name: Adam() for name in parameters}
    radii = {name: parameter.detach().double().norm() for name, parameter in parameters.items()}
    for update, (tokens, labels) in enumerate(batches, start=1):
        logits = model(tokens).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        base, hyperball, multipliers = rates(update)
        with torch.no_grad():
            for name, parameter in parameters.items():
                direction = adam[name].direction(parameter.grad)
                matrix = matrix_of.get(name)
                multiplier = multipliers.get(matrix or "", 1.0)
                if matrix is not None and matrix not in plain:
                    rate = hyperball * multiplier
                    parameter.copy_(step(parameter, direction, rate, radii[name]))
                else:
                    decay = weight_decay if matrix is not None else 0.0
                    parameter.mul_(1 - base * multiplier * decay)
                    parameter.sub_(base * multiplier * direction)
