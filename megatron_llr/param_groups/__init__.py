"""Layer param groups: every logical matrix its own learning rate inside Megatron's optimizer."""
