"""Matrix ids -> the names of their weights in Megatron, NeMo Automodel and torchtitan."""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from megatron_llr.matrices.ids import BLOCK, MatrixId
from megatron_llr.megatron.weight_names import BLOCK_WEIGHTS, EXPERT, MODEL_WEIGHTS

# Word for a Megatron parameter -> the last words of the matrices in it. The others hold one matrix.
_FUSED: Mapping[str, tuple[str, ...]] = {"qkv": ("q", "gate", "k", "v"), "fc1": ("gate", "up")}
_LATENT = "qkv_down"

# LLaMA-like models of transformers, and the models of torchtitan: id without its block -> a regular
# expression for the name of the weight without its layer.
_AUTOMODEL: Mapping[str, str] = {
    **{f"attention.{role}": rf"self_attn\.{role}_proj\.weight$" for role in "qkvo"},
    **{f"mlp.{role}": rf"mlp\.{role}_proj\.weight$" for role in ("gate", "up", "down")},
    "embedding": r"(^|\.)embed_tokens\.weight$",
    "head": r"(^|\.)lm_head\.weight$",
}
_TORCHTITAN: Mapping[str, str] = {
    **{f"attention.{role}": rf"attention\.(\w+\.)?w{role}\.weight$" for role in "qkvo"},
    "mlp.gate": r"feed_forward\.(\w+\.)?w1\.weight$",
    "mlp.down": r"feed_forward\.(\w+\.)?w2\.weight$",
    "mlp.up": r"feed_forward\.(\w+\.)?w3\.weight$",
    "embedding": r"(^|\.)tok_embeddings\.weight$",
    "head": r"(^|\.)(output|lm_head)\.weight$",
}
DIALECTS = {"automodel": _AUTOMODEL, "torchtitan": _TORCHTITAN}


class Parameter(NamedTuple):
    """A parameter of a plain Megatron model.

    Attributes:
        name: its name, with the number of its block in the whole model.
        matrices: the logical matrices in it.
    """

    name: str
    matrices: tuple[MatrixId, ...]


def name_pattern(matrix: MatrixId, dialect: str) -> str | None:
    """A regular expression (for `re.search`) for the name of a weight; None if it has none.

    Args:
        matrix: matrix id.
        dialect: key of `DIALECTS`.
    """
    names = DIALECTS[dialect]
    if not matrix.container:
        return names.get(matrix)
    inside = names.get(f"{matrix.module}.{matrix.weight}")
    if inside is None or matrix.block is None or matrix.expert is not None:
        return None
    return rf"(^|\.)layers\.{matrix.block}\.{inside}"


def megatron_parameters(matrices: Iterable[MatrixId]) -> list[Parameter]:
    """The parameters of the Megatron models that may hold these matrices.

    Experts have two possible names, those of SequentialMLP and of TEGroupedMLP; a model has one.
    Multi-token prediction and hybrid models are left out.
    """
    listed = list(matrices)
    parameters = [
        Parameter(name, (matrix,))
        for matrix in listed
        for name, weight in MODEL_WEIGHTS.items()
        if matrix == weight.role
    ]
    if "embedding" in listed and "head" not in listed:
        # The copy of a tied embedding on the last pipeline stage.
        parameters.append(Parameter("output_layer.weight", (MatrixId("embedding"),)))
    modules: dict[tuple[str, str, int | None], dict[str, MatrixId]] = defaultdict(dict)
    for matrix in listed:
        if matrix.container.startswith(f"{BLOCK}."):
            modules[matrix.container, matrix.module, matrix.expert][matrix.weight] = matrix
    for (container, module, expert), held in modules.items():
        for rule in BLOCK_WEIGHTS:
            if rule.module != module or rule.parameter == _LATENT:
                continue
            words = _FUSED.get(rule.parameter, (rule.parameter,))
            members = tuple(held[word] for word in words if word in held)
            # q is a parameter of its own only in latent attention, which has no k and v.
            is_part = rule.parameter == "q" and "k" in held
            if not members or is_part or (rule.parameter == "qkv" and "k" not in held):
                continue
            path = rule.path.replace(EXPERT, str(expert))
            number = container.removeprefix(f"{BLOCK}.")
            parameters.append(Parameter(f"decoder.layers.{number}.{path}", members))
    return parameters


def is_hybrid(matrices: Iterable[MatrixId]) -> bool:
    """Whether blocks are not Megatron's layers: with Mamba, or with a second module of a kind."""
    return any(
        matrix.module.startswith("mamba") or re.search(r"(attention|mlp)\d", matrix.module)
        for matrix in matrices
    )
