"""Sides of weights that FP8 products cannot have are refused by the flag that makes them."""

from argparse import Namespace
from typing import Any

import pytest

from megatron_llr.megatron.fp8_widths import check_fp8_widths

DEFAULTS: dict[str, Any] = {
    "fp8": "hybrid",
    "fp8_recipe": "delayed",
    "hidden_size": 768,
    "ffn_hidden_size": 2048,
    "num_attention_heads": 12,
    "kv_channels": 64,
    "group_query_attention": False,
    "num_query_groups": 1,
    "multi_latent_attention": False,
    "hybrid_layer_pattern": None,
    "num_experts": None,
    "seq_length": 1024,
    "micro_batch_size": 1,
    "context_parallel_size": 1,
    "tensor_model_parallel_size": 1,
    "sequence_parallel": False,
}
EXPERTS = {
    "num_experts": 8,
    "moe_layer_freq": 1,
    "moe_ffn_hidden_size": 64,
    "expert_tensor_parallel_size": None,
    "moe_shared_expert_intermediate_size": None,
    "moe_latent_size": None,
}
LATENT = {
    "multi_latent_attention": True,
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
    "qk_pos_emb_head_dim": 64,
    "qk_head_dim": 128,
    "v_head_dim": 128,
}
MAMBA = {
    "hidden_size": 1024,
    "hybrid_layer_pattern": "M-*-",
    "mamba_num_heads": None,
    "mamba_head_dim": 64,
    "mamba_num_groups": 8,
    "mamba_state_dim": 128,
}


def check(**settings: Any) -> None:
    check_fp8_widths(Namespace(**{**DEFAULTS, **settings}))


@pytest.mark.parametrize("more", [{}, EXPERTS, LATENT, MAMBA, {"fp8": None, "hidden_size": 7}])
def test_fitting_widths_pass(more: dict[str, Any]) -> None:
    check(**more)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ffn_hidden_size": 1512}, "Use --ffn-hidden-size 1504 or 1520, or leave --fp8-format"),
        (
            {"ffn_hidden_size": 5461, "fp8_recipe": "tensorwise"},
            "--fp8-recipe tensorwise needs .* multiples of 16. --ffn-hidden-size 5461 makes a side "
            "of 5461. Use --ffn-hidden-size 5456 or 5472",
        ),
        (
            {"ffn_hidden_size": 2736, "tensor_model_parallel_size": 2},
            "makes a side of 1368 on each of 2 tensor-parallel ranks. Use --ffn-hidden-size 2720 "
            "or 2752",
        ),
        ({"ffn_hidden_size": 2736, "fp8_recipe": "mxfp8"}, "multiples of 32.*2720 or 2752"),
        ({"ffn_hidden_size": 10}, "Use --ffn-hidden-size 16, or"),
        ({"hidden_size": 772}, "Use --hidden-size 768 or 784"),
        ({"kv_channels": 50}, "--kv-channels 50 makes a side of 600. Use --kv-channels 48 or 52"),
        # q, k and v of 5 heads and 1 group: 7 * 24 = 168.
        (
            {
                "num_attention_heads": 5,
                "kv_channels": 24,
                "group_query_attention": True,
            },
            "--kv-channels 24 makes a side of 120. Use --kv-channels 16 or 32",
        ),
        ({**EXPERTS, "moe_ffn_hidden_size": 40}, "Use --moe-ffn-hidden-size 32 or 48"),
        (
            {**EXPERTS, "moe_ffn_hidden_size": 48, "tensor_model_parallel_size": 2},
            "Use --moe-ffn-hidden-size 32 or 64",
        ),
        (
            {**EXPERTS, "moe_shared_expert_intermediate_size": 40},
            "Use --moe-shared-expert-intermediate-size 32 or 48",
        ),
        ({**LATENT, "q_lora_rank": 40}, "Use --q-lora-rank 32 or 48"),
        ({**LATENT, "qk_pos_emb_head_dim": 8}, "--qk-pos-emb-head-dim 8 makes a side of 72"),
        ({**MAMBA, "mamba_head_dim": 96, "mamba_num_heads": 5}, "makes a side of 3013"),
        (
            {"seq_length": 1020, "micro_batch_size": 1},
            "a multiple of 8 tokens .* which has 1020. Change --seq-length or --micro-batch-size",
        ),
        (
            {"seq_length": 24, "sequence_parallel": True, "tensor_model_parallel_size": 2},
            "which has 12",
        ),
    ],
)
def test_a_side_that_does_not_fit_is_named_with_the_nearest_values(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        check(**settings)
    assert "\n" not in str(refused.value)


def test_experts_in_every_block_leave_the_dense_width_unused() -> None:
    check(**EXPERTS, ffn_hidden_size=1512)
    with pytest.raises(ValueError, match="--ffn-hidden-size"):
        check(**{**EXPERTS, "moe_layer_freq": 2}, ffn_hidden_size=1512)
