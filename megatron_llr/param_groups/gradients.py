"""The attribute in which an optimizer expects the gradient of a tensor.

torch's optimizers read `grad`. FusedAdam of Transformer Engine reads `decoupled_grad` if it was
constructed with `use_decoupled_grad`. That gradient may have another dtype than its tensor.
"""

from typing import Any

GRADIENTS = ("grad", "decoupled_grad")


def gradient_name(optimizer: Any) -> str:
    """The attribute that an optimizer reads gradients from."""
    return GRADIENTS[bool(getattr(optimizer, "use_decoupled_grad", False))]
