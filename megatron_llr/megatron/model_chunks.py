"""Process groups and parameter synchronization of Megatron's model chunks."""

from typing import Any

import megatron.training.training as training_module
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import unwrap_model


def process_groups(model_chunks: list[torch.nn.Module]) -> Any:
    """Process groups of the model: its own collection, or Megatron's global one."""
    groups = getattr(unwrap_model(model_chunks[0]), "pg_collection", None)
    return groups or ProcessGroupCollection.use_mpu_process_groups()


def synchronize_parameters(model_chunks: list[torch.nn.Module], optimizer: Any) -> None:
    """Finish an overlapped parameter gather, so that every rank's weights are current.

    With `--overlap-param-gather` the gather of updated weights runs during the next forward pass;
    until then a rank holds new values for its own shard only. Costs no extra communication: the
    next forward pass finds the gather already done. Enter on all ranks.
    """
    overlapping = [
        chunk
        for chunk in model_chunks
        if getattr(getattr(chunk, "ddp_config", None), "overlap_param_gather", False)
    ]
    if overlapping:
        with torch.no_grad():
            training_module.force_param_sync(overlapping, optimizer)
