"""How far `--llr-spectrum sharded` is from `exact`: alpha_hill_median of pooled shards.

Usage: python benchmarks/sharded_bias.py

Matrices of three kinds, cut into 2, 4 and 8 shards along rows or columns; prints the exponent of
the whole matrix and those of the pooled singular values.
"""

import argparse

import torch

from megatron_llr.spectrum import analyze_matrix, record_from_eigenvalues
from megatron_llr.spectrum.eigenvalues import eigenvalues_of
from megatron_llr.telemetry.tables import text_table


def pooled(weight: torch.Tensor, ways: int, dim: int) -> float:
    """alpha_hill_median of the singular values of all shards together."""
    parts = [eigenvalues_of(part)[0] for part in weight.chunk(ways, dim)]
    values = torch.cat(parts).sort().values
    return record_from_eigenvalues(values, method="pooled").alpha_hill_median


def main() -> None:
    """Print the table."""
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    generator = torch.Generator().manual_seed(0)
    rows = []
    for shape in ((768, 768), (2048, 768)):
        gaussian = torch.randn(shape, generator=generator)
        low = torch.randn(shape[0], 48, generator=generator)
        low = low @ torch.randn(48, shape[1], generator=generator)
        torch.manual_seed(0)
        heavy = torch.distributions.StudentT(2.5).sample(shape)
        kinds = {"gaussian": gaussian, "spiked": gaussian + 0.4 * low, "heavy-tailed": heavy}
        for kind, weight in kinds.items():
            by_cut = [f"{pooled(weight, w, d):.3f}" for d in (0, 1) for w in (2, 4, 8)]
            exact = f"{analyze_matrix(weight).alpha_hill_median:.3f}"
            rows.append((kind, f"{shape[0]}x{shape[1]}", exact, *by_cut))
    ways = [f"{name}/{w}" for name in ("rows", "columns") for w in (2, 4, 8)]
    print(text_table(("matrix", "shape", "exact", *ways), rows))


if __name__ == "__main__":
    main()
