"""Layer param groups: a learning rate per logical matrix inside Megatron's optimizer."""
