"""`SteppedTensor`: one tensor that an inner optimizer steps, and the weight that it stands for."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class SteppedTensor:
    """One tensor that an inner optimizer steps.

    Attributes:
        tensor: the tensor in the optimizer's param groups: a whole weight, or a flat slice of one.
        parameter: the model parameter that it updates.
        start: first element of the slice, in the flattened parameter.
        split: whether the optimizer, which steps it whole, updates each matrix in it separately
            (Muon with query, key and value split).
    """

    tensor: torch.Tensor
    parameter: torch.nn.Parameter
    start: int = 0
    split: bool = False

    @property
    def stop(self) -> int:
        """One past the last element of the slice."""
        return self.start + self.tensor.numel()
