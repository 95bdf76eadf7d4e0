"""Checkpoints from Hugging Face to Megatron and back, one tensor at a time."""
