"""Small models of `transformers`, one for each family that can be converted."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

_SHAPE = {
    "num_hidden_layers": 4,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 250,
    "max_position_embeddings": 16,
}

# Specific to each family: frequency scaling, a window, tied embeddings and biases, norms of heads
# whose width is not hidden / heads.
BUILDERS: dict[str, dict[str, Any]] = {
    "llama": {
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    "mistral": {"sliding_window": 5},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 48},
}

# Megatron's flags for a model of each family, to train from random weights.
FLAGS = {
    "llama": "--use-rope-scaling --rope-scaling-factor 8.0 --rotary-base 500000",
    "mistral": "--window-size 4,0",
    "qwen2": "--add-qkv-bias",
    "qwen3": "--qk-layernorm --kv-channels 48",
}


def build(family: str) -> Any:
    """A random fp32 model in evaluation mode; norms and biases are not constant."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **_SHAPE, **BUILDERS[family])
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.05)
            else:
                parameter.normal_(mean=0.7, std=0.2)
    return model.eval()


def save(model: Any, folder: Path, shard_size: str = "200KB") -> None:
    """Write it as transformers does, in several files."""
    model.save_pretrained(folder, max_shard_size=shard_size)
