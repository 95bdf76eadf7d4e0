"""Converts text to Megatron's indexed datasets."""
