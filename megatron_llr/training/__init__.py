"""The extension inside `megatron.training`: flags, scheduler, hooks, and the GPT job."""
