"""From matrices to spectrum records: pure torch, not distributed."""

from megatron_llr.spectrum.analyze import (
    analyze_matrix,
    record_from_eigenvalues,
    records_from_eigenvalues,
)

__all__ = ["analyze_matrix", "record_from_eigenvalues", "records_from_eigenvalues"]
