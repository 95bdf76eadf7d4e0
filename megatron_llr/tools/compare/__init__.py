"""Grids of training jobs that differ only in policy, learning rate and seed, and their results."""
