"""One stepped tensor seen as the matrices fused in it: views, no copy of weights or state."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_llr.param_groups.gradients import GRADIENTS

Part = tuple[str, tuple[tuple[int, int], ...]]
"""Matrix id, and where its elements lie in the flattened tensor: (first, one past last)."""


@dataclass(frozen=True, slots=True)
class Window:
    """Equal runs of elements at equal distances in a flattened tensor: what one view can show.

    Attributes:
        first: first element.
        length: elements of one run.
        count: number of runs.
        period: elements from the start of one run to that of the next.
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
    """As few windows as show the ranges, in their order.

    Interleaved projections repeat with a fixed period, so that a few windows replace a view per
    attention head; a shard that cuts into them has shorter runs at its ends.

    Args:
        ranges: (first, one past last), ascending.
        strided: whether a window may hold several runs.
    """
    found: list[Window] = []
    for first, last in ranges:
        if first == last:
            # Transformer Engine below 2.18 skips a group that ends in an empty tensor.
            continue
        before = found[-1] if found else None
        if strided and before is not None and before.length == last - first:
            period = before.period if before.count > 1 else first - before.first
            if first == before.first + before.count * period:
                found[-1] = Window(before.first, before.length, before.count + 1, period)
                continue
        found.append(Window(first, last - first, 1, 0))
    return found


class FusedTensor:
    """Views of a stepped tensor, of its gradient and of its optimizer state, one set per matrix.

    Only element-wise optimizers may be given such views (`capability.stepping`).

    Args:
        tensor: as it stands in the optimizer's groups, contiguous.
        parts: the matrices in it; their ranges cover it.
        strided: whether the optimizer takes views with a stride.
    """

    def __init__(
        self, tensor: torch.Tensor, parts: tuple[Part, ...], *, strided: bool = False
    ) -> None:
        self.tensor = tensor
        self.parts = parts
        flat = tensor.detach().view(-1)
        self._address = tensor.data_ptr()
        shown = {matrix: windows(ranges, strided=strided) for matrix, ranges in parts}
        self.views: dict[str, list[torch.Tensor]] = {
            matrix: [window.of(flat) for window in found] for matrix, found in shown.items()
        }
        self._windowed = [
            (view, window)
            for matrix, found in shown.items()
            for view, window in zip(self.views[matrix], found, strict=True)
        ]
        # What the views' gradients are slices of; None where the tensor had none.
        self._gradients: dict[str, torch.Tensor | None] = {}
        self._sources: dict[str, Any] = {}
        # Of the first view's state, what shares memory with the tensor's.
        self._shared: dict[str, Any] = {}
        # Of all views' states, what does not: (name, one for each view).
        self._counters: list[tuple[str, list[torch.Tensor]]] = []
        self._states: list[dict[str, Any]] = [{} for _ in self._windowed]

    def is_stale(self) -> bool:
        """Whether the tensor has been given other memory since the views were made."""
        return self._address != self.tensor.data_ptr()

    def slice_gradient(self) -> None:
        """Give every view its part of the tensor's gradient, under the name it stands under."""
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

        A gradient that is a part of a larger buffer, as Megatron's are, is not freed between steps:
        its slices are kept.
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
        """Put the state of every view into `to`: slices of `base`, counters copied.

        Args:
            base: optimizer state of the whole tensor; empty before its first step.
            to: the optimizer's state during its step.
        """
        if not self._is_current(base):
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
            # A step that took the tensor whole has counted in place.
            for key, counters in self._counters:
                torch._foreach_copy_(counters, [base[key]] * len(counters))
        for (view, _), state in zip(self._windowed, self._states, strict=True):
            to[view] = state

    def return_state(self, base: dict[str, Any], lent: Mapping[Any, Any]) -> None:
        """Bring into `base` what the step changed beyond the shared memory of the slices."""
        states = [lent.get(view, {}) for view, _ in self._windowed]
        if not states or not states[0]:
            return
        for key, value in states[0].items():
            if value is self._shared.get(key) and key in base:
                continue
            # A counter has one element; so may a view, but a counter has no axis.
            if isinstance(value, torch.Tensor) and value.shape == self._windowed[0][0].shape:
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

    def _slice(self, value: Any, window: Window) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        if value.numel() == self.tensor.numel():
            return window.of(value.view(-1))
        assert value.numel() == 1, f"state of {tuple(value.shape)} for {tuple(self.tensor.shape)}"
        return value.clone()

    def _join(self, pieces: list[torch.Tensor]) -> torch.Tensor:
        whole = pieces[0].new_empty(self.tensor.numel())
        for (_, window), piece in zip(self._windowed, pieces, strict=True):
            window.of(whole).copy_(piece)
        return whole.view(self.tensor.shape)
