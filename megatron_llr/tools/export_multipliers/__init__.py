"""Export the multipliers of a run to role tables, Megatron, NeMo Automodel and torchtitan."""
