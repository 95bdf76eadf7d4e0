"""One stepped tensor seen as the matrices fused in it: views, no copy of weights or state."""

from collections.abc import Mapping
from typing import Any

import torch

Part = tuple[str, tuple[tuple[int, int], ...]]
"""Matrix id, and where its elements lie in the flattened tensor: (first, one past last)."""


class FusedTensor:
    """Views of a stepped tensor, of its gradient and of its optimizer state, one set per matrix.

    Only element-wise optimizers may be given such views (`capability.takes_views`).

    Args:
        tensor: as it stands in the optimizer's groups, contiguous.
        parts: the matrices in it; their ranges cover it.
    """

    def __init__(self, tensor: torch.Tensor, parts: tuple[Part, ...]) -> None:
        self.tensor = tensor
        self.parts = parts
        flat = tensor.detach().view(-1)
        self._address = tensor.data_ptr()
        self.views: dict[str, list[torch.Tensor]] = {
            matrix: [flat[first:last] for first, last in ranges] for matrix, ranges in parts
        }
        self._ranged = [
            (view, first, last)
            for matrix, ranges in parts
            for view, (first, last) in zip(self.views[matrix], ranges, strict=True)
        ]
        self._kept_gradient: torch.Tensor | None = None
        self._sources: dict[str, Any] = {}
        self._states: list[dict[str, Any]] = [{} for _ in self._ranged]

    def is_stale(self) -> bool:
        """Whether the tensor has been given other memory since the views were made."""
        return self._address != self.tensor.data_ptr()

    def slice_gradient(self) -> None:
        """Give every view its part of the tensor's gradient, under the name it stands under."""
        for name in ("grad", "decoupled_grad"):
            gradient = getattr(self.tensor, name, None)
            if gradient is not None and gradient is self._kept_gradient:
                continue
            if gradient is None:
                for view, _, _ in self._ranged:
                    setattr(view, name, None)
            else:
                flat = gradient.reshape(-1)
                for view, first, last in self._ranged:
                    setattr(view, name, flat[first:last])

    def release_gradient(self) -> None:
        """Drop the references to the gradient, so that its memory can be freed.

        A gradient that lies in Megatron's buffer is not freed between steps; its slices are kept.
        """
        gradient = getattr(self.tensor, "grad", None)
        if gradient is not None and gradient is getattr(self.tensor, "main_grad", None):
            self._kept_gradient = gradient
            return
        self._kept_gradient = None
        for view, _, _ in self._ranged:
            view.grad = None
            view.decoupled_grad = None  # type: ignore[attr-defined]

    def lend_state(self, base: Mapping[str, Any], to: dict[Any, Any]) -> None:
        """Put the state of every view into `to`: slices of `base`, counters copied.

        Args:
            base: optimizer state of the whole tensor; empty before its first step.
            to: the optimizer's state during its step.
        """
        if not self._is_current(base):
            self._sources = dict(base)
            self._states = [
                {key: self._slice(value, first, last) for key, value in base.items()}
                for _, first, last in self._ranged
            ]
        for (view, _, _), state in zip(self._ranged, self._states, strict=True):
            to[view] = state

    def return_state(self, base: dict[str, Any], lent: Mapping[Any, Any]) -> None:
        """Bring into `base` what the step changed beyond the shared memory of the slices."""
        states = [lent.get(view, {}) for view, _, _ in self._ranged]
        if not states or not states[0]:
            return
        for key, value in states[0].items():
            if self._is_sliced(value, self._ranged[0]):
                if key not in base:
                    base[key] = self._join([state[key] for state in states])
            elif isinstance(value, torch.Tensor) and isinstance(base.get(key), torch.Tensor):
                base[key].copy_(value)
            else:
                base[key] = value.clone() if isinstance(value, torch.Tensor) else value
                self._sources[key] = base[key]

    def _is_current(self, base: Mapping[str, Any]) -> bool:
        return len(base) == len(self._sources) and all(
            self._sources.get(key) is value for key, value in base.items()
        )

    def _slice(self, value: Any, first: int, last: int) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        if value.numel() == self.tensor.numel():
            return value.view(-1)[first:last]
        assert value.numel() == 1, f"state of {tuple(value.shape)} for {tuple(self.tensor.shape)}"
        return value.clone()

    @staticmethod
    def _is_sliced(value: Any, ranged: tuple[torch.Tensor, int, int]) -> bool:
        # A counter has one element; so may a view, but a counter has no axis.
        return isinstance(value, torch.Tensor) and value.shape == ranged[0].shape

    def _join(self, pieces: list[torch.Tensor]) -> torch.Tensor:
        whole = pieces[0].new_empty(self.tensor.numel())
        for (_, first, last), piece in zip(self._ranged, pieces, strict=True):
            whole[first:last] = piece
        return whole.view(self.tensor.shape)
