"""Megatron's learning-rate scheduler, which also calls the controller and saves its state."""

from typing import Any

from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_llr import state
from megatron_llr.controller import LayerwiseController


class LayerwiseParamScheduler(OptimizerParamScheduler):  # type: ignore[misc]
    """`OptimizerParamScheduler` that calls a controller after every successful update.

    The base learning rates it sets are bitwise Megatron's. `step` is called on all ranks after
    every successful update, outside any CUDA graph, so it may run collectives.

    Args:
        controller: its state document is part of `state_dict()`.
        args: passed on.
        kwargs: passed on.
    """

    def __init__(self, *args: Any, controller: LayerwiseController, **kwargs: Any) -> None:
        # Megatron's constructor calls step(0).
        self._controller = controller
        self._loading = False
        self._saved: str | None = None
        super().__init__(*args, **kwargs)

    def step(self, increment: int) -> None:
        """Set the base learning rates; after an update, call the controller."""
        super().step(increment)
        if increment > 0 and not self._loading:
            self._controller.after_update()

    def state_dict(self) -> dict[str, Any]:
        """Megatron's state, and the controller's as one JSON string."""
        document = self._controller.state_dict()
        # Megatron saves before `restore_controller` when it converts a checkpoint's format.
        waiting = "" if self._controller.config.reset_state else self._saved or ""
        kept = state.encode(document) if document else waiting
        return {**super().state_dict(), state.KEY: kept}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load Megatron's state; keep the controller's for `restore_controller`."""
        # Megatron's loader calls step(num_steps), which is not an update.
        self._loading = True
        try:
            super().load_state_dict(state_dict)
        finally:
            self._loading = False
        self._saved = state_dict.get(state.KEY)

    def restore_controller(self) -> bool:
        """Give the controller its state, if the checkpoint has one.

        Returns:
            Whether there was a state.

        Not part of `load_state_dict`: Megatron's loader runs collectives after it, in which the
        other ranks would wait for a rank that cannot use its state.

        Raises:
            ValueError: if this run cannot continue from it (`--llr-reset-state` ignores it).
        """
        document = None if self._controller.config.reset_state else state.decode(self._saved)
        if document is not None:
            self._controller.load_state_dict(document)
        return document is not None
