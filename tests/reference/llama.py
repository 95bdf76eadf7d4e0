"""A LLaMA in plain PyTorch, with q, k, v, gate and up as separate parameters.

`transformers`' own model is the reference: it is independent of Megatron's fused weights.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

ROLES = {
    "attention.q": "self_attn.q_proj",
    "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj",
    "attention.o": "self_attn.o_proj",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}
# Norms have no matrix id. Megatron's names -> Hugging Face's.
NORMS = {"input_layernorm": "input_layernorm", "pre_mlp_layernorm": "post_attention_layernorm"}


def build(*, blocks: int, hidden: int, ffn: int, heads: int, groups: int, vocab: int) -> Any:
    """An untied fp32 LLaMA with the conventions that Megatron's flags give."""
    config = LlamaConfig(
        num_hidden_layers=blocks,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        vocab_size=vocab,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        attn_implementation="eager",
    )
    return LlamaForCausalLM(config).float()


def matrix_names(blocks: int) -> dict[str, str]:
    """Matrix id -> name of the Hugging Face parameter."""
    names = {"embedding": "model.embed_tokens.weight", "head": "lm_head.weight"}
    for block in range(blocks):
        for role, module in ROLES.items():
            names[f"block.{block}.{role}"] = f"model.layers.{block}.{module}.weight"
    return names


def norm_names(blocks: int) -> dict[str, str]:
    """Megatron's name of a norm (one pipeline stage) -> Hugging Face's."""
    names = {"decoder.final_layernorm.weight": "model.norm.weight"}
    for block in range(blocks):
        for ours, theirs in NORMS.items():
            names[f"decoder.layers.{block}.{ours}.weight"] = f"model.layers.{block}.{theirs}.weight"
    return names


def train(
    model: Any,
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    rates: Callable[[int], tuple[float, Mapping[str, float]]],
    names: Mapping[str, str],
    *,
    weight_decay: float,
    clip: float,
) -> None:
    """AdamW with one param group per matrix, at base rate x multiplier.

    Args:
        model: changed in place.
        batches: tokens and labels of every update, [batch, sequence].
        rates: update from 1 -> (base rate, matrix id -> multiplier).
        names: matrix id -> parameter name.
        weight_decay: on matrices; norms have none, as in Megatron.
        clip: largest norm of all gradients together.
    """
    parameters = dict(model.named_parameters())
    groups = [{"params": [parameters[name]], "matrix": matrix} for matrix, name in names.items()]
    rest = [p for name, p in parameters.items() if name not in names.values()]
    groups.append({"params": rest, "matrix": None, "weight_decay": 0.0})
    optimizer = torch.optim.AdamW(groups, weight_decay=weight_decay, foreach=False)
    for update, (tokens, labels) in enumerate(batches, start=1):
        logits = model(tokens).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        base, multipliers = rates(update)
        for group in optimizer.param_groups:
            group["lr"] = base * multipliers.get(group["matrix"], 1.0)
        optimizer.step()
