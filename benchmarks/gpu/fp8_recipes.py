"""The FP8 recipes, and whether this card and this Transformer Engine can run them."""

import importlib

_CHECKS = {
    "delayed": "is_fp8_available",
    "tensorwise": "is_fp8_available",
    "blockwise": "is_fp8_block_scaling_available",
    "mxfp8": "is_mxfp8_available",
}
"""Megatron's --fp8-recipe -> Transformer Engine's function that answers (available, reason)."""

RECIPES = tuple(_CHECKS)


def why_unavailable(recipe: str, device: str) -> str:
    """Why a recipe cannot run here; empty if it can.

    Args:
        recipe: a value of --fp8-recipe.
        device: cuda or cpu.
    """
    reason = "FP8 needs a GPU"
    if device == "cuda":
        engine = importlib.import_module("transformer_engine.pytorch")
        available, reason = getattr(engine, _CHECKS[recipe])(return_reason=True)
        if available:
            return ""
    return f"FP8 recipe {recipe} is not available on this card: {reason}"
