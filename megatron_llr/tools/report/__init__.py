"""Figures and a summary of one run."""
