"""What fp8 weights do to the exponents: alpha_hill_median of weights rounded as fp8 recipes round.

Usage: python benchmarks/fp8_noise.py [HF_FOLDER]

HF_FOLDER holds safetensors, as the converter writes them of a trained model; its matrices are
averaged per role. Without it, random matrices of known tails. Roundings are those of Transformer
Engine's recipes: delayed scaling (E4M3, one scale per tensor), blockwise (E4M3, a scale per 128 x
128 block), MXFP8 (E4M3, a power-of-two scale per 32 values of a row).
"""

import argparse
import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch

from megatron_llr import analyze_matrix

E4M3_MAX = 448.0
_ROLES = re.compile(r"(q|k|v|o|gate|up|down)_proj\.weight$")


def _round(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (values * scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).float() / scale


def round_delayed(weight: torch.Tensor) -> torch.Tensor:
    """One scale for the tensor."""
    return _round(weight, E4M3_MAX / weight.abs().max())


def _blocks(weight: torch.Tensor, rows: int, columns: int) -> tuple[torch.Tensor, tuple[int, int]]:
    """[row blocks, rows, column blocks, columns], padded with zeros."""
    height, width = weight.shape
    padded = torch.nn.functional.pad(weight, (0, -width % columns, 0, -height % rows))
    shape = (padded.shape[0] // rows, rows, padded.shape[1] // columns, columns)
    return padded.view(shape), (height, width)


def round_blockwise(weight: torch.Tensor) -> torch.Tensor:
    """A scale for every 128 x 128 block."""
    blocks, (height, width) = _blocks(weight, 128, 128)
    largest = blocks.abs().amax(dim=(1, 3), keepdim=True).clamp_min(1e-30)
    return _round(blocks, E4M3_MAX / largest).flatten(2).flatten(0, 1)[:height, :width]


def round_mxfp8(weight: torch.Tensor) -> torch.Tensor:
    """A power of two for every 32 values of a row."""
    blocks, (height, width) = _blocks(weight, 1, 32)
    largest = blocks.abs().amax(dim=(1, 3), keepdim=True).clamp_min(1e-30)
    scale = torch.exp2(torch.floor(torch.log2(E4M3_MAX / largest)))
    return _round(blocks, scale).flatten(2).flatten(0, 1)[:height, :width]


RECIPES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "bf16": lambda weight: weight.bfloat16().float(),
    "delayed": round_delayed,
    "blockwise": round_blockwise,
    "mxfp8": round_mxfp8,
}


def matrices(folder: Path | None) -> dict[str, list[torch.Tensor]]:
    """Kind -> matrices."""
    if folder is not None:
        from safetensors.torch import load_file

        by_role: dict[str, list[torch.Tensor]] = defaultdict(list)
        for file in sorted(folder.glob("*.safetensors")):
            for name, weight in load_file(file).items():
                role = _ROLES.search(name)
                if role:
                    by_role[role[1]].append(weight.float())
        return dict(sorted(by_role.items()))
    generator = torch.Generator().manual_seed(0)
    gaussian = torch.randn(1024, 1024, generator=generator) * 0.02
    wide = torch.randn(1024, 2816, generator=generator) * 0.02
    left, _, right = torch.linalg.svd(gaussian)
    kinds = {"gaussian 1024 x 1024": [gaussian], "gaussian 1024 x 2816": [wide]}
    for tail in (2.0, 3.0, 5.0):
        # Eigenvalues of a Pareto law with this exponent, in random directions.
        eigenvalues = (torch.arange(1, 1025) / 1025).pow(-1 / (tail - 1))
        kinds[f"power law {tail:g}"] = [left @ torch.diag(0.02 * eigenvalues.sqrt()) @ right]
    return kinds


def main() -> None:
    """Print a Markdown table: the exponent, and its mean relative change with every recipe."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", nargs="?", type=Path, help="Hugging Face folder")
    kinds = matrices(parser.parse_args().folder)
    print(f"| weights | alpha_hill_median, fp32 | {' | '.join(RECIPES)} |")
    print("|---" * (2 + len(RECIPES)) + "|")
    for kind, weights in kinds.items():
        exact = [analyze_matrix(weight).alpha_hill_median for weight in weights]
        cells = []
        for recipe in RECIPES.values():
            rounded = [analyze_matrix(recipe(weight)).alpha_hill_median for weight in weights]
            change = [(b - a) / a for a, b in zip(exact, rounded, strict=True)]
            cells.append(f"{sum(change) / len(change):+.2%}")
        print(f"| {kind} ({len(weights)}) | {sum(exact) / len(exact):.3f} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
