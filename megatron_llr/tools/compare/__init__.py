"""Grids of training jobs that differ in policy, learning rate and seed alone, and what came out."""
