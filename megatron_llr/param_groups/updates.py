"""How far one update moved every matrix, measured on the tensors that an optimizer steps."""

import contextlib
from collections.abc import Iterator, Sequence

import torch

from megatron_llr.param_groups.stepped_tensor import SteppedTensor
from megatron_llr.param_groups.views import Part, windows


def square_sum(flat: torch.Tensor, ranges: Sequence[tuple[int, int]]) -> torch.Tensor:
    """Sum of squares over ranges of a flattened tensor: fp64, no dimensions, on its device."""
    norms: list[torch.Tensor] = [
        torch.linalg.vector_norm(window.of(flat), dtype=torch.float64)
        for window in windows(ranges, strided=True)
    ]
    if len(norms) == 1:
        return norms[0].square()
    # Nothing of a matrix may lie here: a slice of a vocabulary's padding alone.
    return torch.stack(norms).square().sum() if norms else flat.new_zeros((), dtype=torch.float64)


class UpdateRecorder:
    """Squared norm of what one step of an inner optimizer changes, per matrix.

    While it is armed, a copy of the tensors lives as long as the step.

    Args:
        parts: the stepped tensors and the matrices in each.

    Attributes:
        armed: whether the next step is to be recorded.
    """

    def __init__(self, parts: Sequence[tuple[SteppedTensor, tuple[Part, ...]]]) -> None:
        self.armed = False
        self._parts = parts
        self._found: list[tuple[str, int, torch.Tensor]] = []

    @contextlib.contextmanager
    def around_step(self) -> Iterator[None]:
        """Record the step inside, if armed; one that raises leaves no record."""
        self._found = []
        if not self.armed:
            yield
            return
        before = [master.tensor.detach().clone() for master, _ in self._parts]
        yield
        with torch.no_grad():
            for (master, parts), moved in zip(self._parts, before, strict=True):
                # In place: the copy is needed no more.
                flat = moved.sub_(master.tensor.detach()).view(-1)
                for matrix, ranges in parts:
                    count = sum(last - first for first, last in ranges)
                    self._found.append((matrix, count, square_sum(flat, ranges)))

    def take(self) -> list[tuple[str, int, torch.Tensor]]:
        """(matrix, elements here, sum of their squared changes) of the last step; then forgotten.

        Empty if that step was not recorded.
        """
        found, self._found = self._found, []
        return found
