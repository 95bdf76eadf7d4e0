"""AdamW with the step counter in the param group, as in Transformer Engine and apex."""

from collections.abc import Callable, Iterable
from typing import Any

import torch


class GroupStepAdamW(torch.optim.Optimizer):
    """AdamW (arXiv 1711.05101) for the CPU route, with `step` in the param group.

    Bitwise equal to torch's `AdamW(foreach=False)`: the same operations in the same order.
    Megatron's distributed optimizer expects `step` in the group of a fused Adam when it saves and
    loads.

    Args:
        params: tensors or param groups; any float dtype, any shape.
        lr: learning rate.
        bias_correction: divide the moments by 1 - beta ** step.
        betas: decay of the first and second moment.
        eps: added to the square root of the second moment.
        adam_w_mode: decoupled weight decay. Only True is supported.
        weight_decay: weight decay per step, multiplied by the learning rate.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
        **unused: object,
    ) -> None:
        if not adam_w_mode:
            raise ValueError(
                "OptimizerConfig(decoupled_weight_decay=False) is not supported on the CPU route. "
                "Remove it"
            )
        defaults = {
            "lr": lr,
            "bias_correction": bias_correction,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient; count one step in every group."""
        if closure is not None:
            raise ValueError("closure is not supported")
        # The code below names no device, so the CPU route's function mode is not needed.
        with torch._C.DisableTorchFunction():
            for group in self.param_groups:
                group["step"] = int(group.get("step", 0)) + 1
                for param in group["params"]:
                    if param.grad is not None:
                        self._update(param, param.grad, group)

    def _update(self, param: torch.Tensor, grad: torch.Tensor, group: dict[str, Any]) -> None:
        state = self.state[param]
        if "exp_avg" not in state:
            state["exp_avg"] = torch.zeros_like(param)
            state["exp_avg_sq"] = torch.zeros_like(param)
        beta1, beta2 = group["betas"]
        lr, step = float(group["lr"]), group["step"]
        grad = grad.to(param.dtype)
        param.mul_(1 - lr * group["weight_decay"])
        state["exp_avg"].lerp_(grad, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        correction1 = 1 - beta1**step if group["bias_correction"] else 1.0
        correction2 = 1 - beta2**step if group["bias_correction"] else 1.0
        denominator = (state["exp_avg_sq"].sqrt() / correction2**0.5).add_(group["eps"])
        param.addcdiv_(state["exp_avg"], denominator, value=-lr / correction1)
