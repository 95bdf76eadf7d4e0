"""Text into Megatron's indexed datasets."""
