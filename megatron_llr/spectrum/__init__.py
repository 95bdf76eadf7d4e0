"""Matrices in, their spectrum records out: pure torch, nothing distributed."""

from megatron_llr.spectrum.analyze import (
    analyze_matrix,
    record_from_eigenvalues,
    records_from_eigenvalues,
)

__all__ = ["analyze_matrix", "record_from_eigenvalues", "records_from_eigenvalues"]
