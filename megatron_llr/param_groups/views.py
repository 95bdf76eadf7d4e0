"""Views of the matrices fused in one stepped tensor, without copies of weights or state."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_llr.matrices.ids import MatrixId
from megatron_llr.param_groups.gradients import GRADIENTS
from megatron_llr.param_groups.stepped_tensor import MatrixRanges


@dataclass(frozen=True, slots=True)
class Window:
    """Runs of equal length at equal distances in a flattened tensor: the elements of one view.

    Attributes:
        first: first element.
        length: elements per run.
        count: number of runs.
        period: elements between the starts of consecutive runs.
    """

    first: int
    length: int
    count: int
    period: int

    def of(self, flat: torch.Tensor) -> torch.Tensor:
        """The view: [length], or [count, length] with a stride between the runs."""
        if self.count == 1:
            return flat[self.first : self.first + self.length]
        offset = flat.storage_offset() + self.first
        return flat.as_strided((self.count, self.length), (self.period, 1), offset)


def windows(ranges: Sequence[tuple[int, int]], *, strided: bool) -> list[Window]:
    """The smallest list of windows that covers the ranges, in their order.

    Interleaved projections repeat with a fixed period, so a few windows replace one view per
    attention head. A slice that begins or ends inside a run has shorter runs at its ends.

    Args:
        ranges: (first, one past last), ascending.
        strided: whether a window may hold several runs.
    """
    covering: list[Window] = []
    for first, last in ranges:
        if first == last:
            # Transformer Engine below 2.18 skips a group that ends in an empty tensor.
            continue
        before = covering[-1] if covering else None
        if strided and before is not None and before.length == last - first:
            period = before.period if before.count > 1 else first - before.first
            if first == before.first + before.count * period:
                covering[-1] = Window(before.first, before.length, before.count + 1, period)
                continue
        covering.append(Window(first, last - first, 1, 0))
    return covering


class FusedTensor:
    """Views of a stepped tensor, of its gradient and of its optimizer state, one set per matrix.

    Only for element-wise optimizers (`probe.stepping`).

    Args:
        tensor: tensor in the optimizer's groups, contiguous.
        parts: the matrices in it. Their ranges cover it.
        strided: whether the optimizer supports views with a stride.

    Attributes:
        views: matrix id -> views of its elements.
    """

    def __init__(
        self, tensor: torch.Tensor, parts: tuple[MatrixRanges, ...], *, strided: bool = False
    ) -> None:
        self.tensor = tensor
        self.parts = parts
        flat = tensor.detach().view(-1)
        self._address = tensor.data_ptr()
        self.views: dict[MatrixId, list[torch.Tensor]] = {}
        self._windowed: list[tuple[torch.Tensor, Window]] = []
        for matrix, ranges in parts:
            windowed = [(w.of(flat), w) for w in windows(ranges, strided=strided)]
            self.views[matrix] = [view for view, _ in windowed]
            self._windowed += windowed
        # The tensor's gradients that the views' gradients are slices of.
        self._gradients: dict[str, torch.Tensor | None] = {}
        # The tensor's state that the views' states were made from.
        self._sources: dict[str, Any] = {}
        # Entries of the first view's state that share memory with the tensor's state.
        self._shared: dict[str, Any] = {}
        # Entries of the views' states that are copies: (name, one per view).
        self._counters: list[tuple[str, list[torch.Tensor]]] = []
        self._states: list[dict[str, Any]] = [{} for _ in self._windowed]

    def is_stale(self) -> bool:
        """Whether the tensor's memory has been replaced since the views were created."""
        return self._address != self.tensor.data_ptr()

    def slice_gradient(self) -> None:
        """Set the gradient of every view to its part of the tensor's gradient."""
        for name in GRADIENTS:
            gradient = getattr(self.tensor, name, None)
            if name in self._gradients and gradient is self._gradients[name]:
                continue
            self._gradients[name] = gradient
            if gradient is None:
                for view, _ in self._windowed:
                    setattr(view, name, None)
            else:
                flat = gradient.reshape(-1)
                for view, window in self._windowed:
                    setattr(view, name, window.of(flat))

    def release_gradient(self) -> None:
        """Drop the references to the gradient, so that its memory can be freed.

        Slices of a gradient that is part of a larger buffer, as in Megatron, are kept, since the
        buffer is not freed between steps.
        """
        gradient = getattr(self.tensor, "grad", None)
        if gradient is not None and gradient.untyped_storage().nbytes() > gradient.nbytes:
            return
        for name, sliced in self._gradients.items():
            if sliced is not None:
                for view, _ in self._windowed:
                    setattr(view, name, None)
                self._gradients[name] = None

    def lend_state(self, base: Mapping[str, Any], to: dict[Any, Any]) -> None:
        """Put the state of every view into `to`: slices of `base`, and copies of counters.

        Args:
            base: optimizer state of the whole tensor; empty before its first step.
            to: the optimizer's state during its step.
        """
        is_current = len(base) == len(self._sources) and all(
            self._sources.get(key) is value for key, value in base.items()
        )
        if not is_current:
            self._sources = dict(base)
            self._states = [
                {key: self._slice(value, window) for key, value in base.items()}
                for _, window in self._windowed
            ]
            self._shared = {
                key: value
                for key, value in self._states[0].items()
                if isinstance(value, torch.Tensor) and base[key].numel() == self.tensor.numel()
            }
            self._counters = [
                (key, [state[key] for state in self._states])
                for key, value in base.items()
                if isinstance(value, torch.Tensor) and key not in self._shared
            ]
        else:
            # A step of the whole tensor has incremented the counters in place.
            for key, counters in self._counters:
                torch._foreach_copy_(counters, [base[key]] * len(counters))
        for (view, _), state in zip(self._windowed, self._states, strict=True):
            to[view] = state

    def return_state(self, base: dict[str, Any], lent: Mapping[Any, Any]) -> None:
        """Copy into `base` the entries that do not share memory with it and that a step changed."""
        states = [lent.get(view, {}) for view, _ in self._windowed]
        if not states or not states[0]:
            return
        for key, value in states[0].items():
            if value is self._shared.get(key) and key in base:
                continue
            # A view may have one element, as a counter has, but a counter has no dimensions.
            if isinstance(value, torch.Tensor) and value.shape == self._windowed[0][0].shape:
                if key not in base:
                    whole = value.new_empty(self.tensor.numel())
                    for (_, window), state in zip(self._windowed, states, strict=True):
                        window.of(whole).copy_(state[key])
                    base[key] = whole.view(self.tensor.shape)
            elif isinstance(value, torch.Tensor) and isinstance(base.get(key), torch.Tensor):
                base[key].copy_(value)
            else:
                base[key] = value.clone() if isinstance(value, torch.Tensor) else value
                self._sources[key] = base[key]

    def _slice(self, value: Any, window: Window) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        if value.numel() == self.tensor.numel():
            return window.of(value.view(-1))
        assert value.numel() == 1, f"state of {tuple(value.shape)} for {tuple(self.tensor.shape)}"
        return value.clone()
