"""Megatron's hybrid models with its local layers. Megatron's own specs for them need a GPU.

Imports megatron, so `cpu/emulation.py` imports it after its other substitutions. Mamba layers still
need the package mamba-ssm, which runs only on GPUs.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import megatron.core.models.hybrid.hybrid_block as hybrid_block
import megatron.training.models.hybrid as hybrid_models
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec
from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
from megatron.core.ssm.mamba_mixer import MambaMixer, MambaMixerSubmodules
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.multi_latent_attention import (
    MLASelfAttention,
    MLASelfAttentionSubmodules,
)
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlock,
    MultiTokenPredictionBlockSubmodules,
    get_mtp_layer_spec,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import (
    MoETransformerLayer,
    TransformerLayer,
    TransformerLayerSubmodules,
)

_LOCAL = LocalSpecProvider()
_COLUMN, _ROW, _NORM = (
    _LOCAL.column_parallel_linear(),
    _LOCAL.row_parallel_linear(),
    _LOCAL.layer_norm(rms_norm=True),
)


def substitute() -> None:
    """Make local layers the default of hybrid models. Layers without one are unchanged."""
    block: Any = hybrid_block
    models: Any = hybrid_models
    block.TENorm = _NORM
    mamba_mixer = ModuleSpec(
        module=MambaMixer, submodules=MambaMixerSubmodules(in_proj=_COLUMN, out_proj=_ROW)
    )
    mamba = MambaLayerSubmodules(norm=_NORM, mixer=mamba_mixer, mamba_bda=get_bias_dropout_add)
    # The layers inside come from the pattern of the model.
    prediction_layer = get_mtp_layer_spec(None, use_transformer_engine=False)
    prediction = MultiTokenPredictionBlockSubmodules(layer_specs=[prediction_layer])
    submodules = replace(
        hybrid_stack_spec.submodules,
        mamba_layer=ModuleSpec(module=MambaLayer, submodules=mamba),
        attention_layer=_mixer(
            SelfAttention,
            SelfAttentionSubmodules(
                linear_qkv=_COLUMN, core_attention=_LOCAL.core_attention(), linear_proj=_ROW
            ),
        ),
        mla_layer=_mixer(
            MLASelfAttention,
            MLASelfAttentionSubmodules(
                linear_q_proj=_COLUMN,
                linear_q_down_proj=_COLUMN,
                linear_q_up_proj=_COLUMN,
                linear_kv_down_proj=_COLUMN,
                linear_kv_up_proj=_COLUMN,
                core_attention=_LOCAL.core_attention(),
                linear_proj=_ROW,
                q_layernorm=IdentityOp,
                kv_layernorm=IdentityOp,
            ),
        ),
        mlp_layer=_feed_forward(
            MLPLayer,
            partial(
                MLP.as_mlp_submodule,
                submodules=MLPSubmodules(linear_fc1=_COLUMN, linear_fc2=_ROW),
            ),
        ),
        # The number of experts comes from the model's configuration.
        moe_layer=_feed_forward(
            MoETransformerLayer, get_moe_module_spec(use_te=False, num_experts=8)
        ),
        mtp_block_spec=ModuleSpec(module=MultiTokenPredictionBlock, submodules=prediction),
    )
    stack = ModuleSpec(module=hybrid_stack_spec.module, submodules=submodules)
    models.default_hybrid_stack_spec = stack


def _mixer(attention: type, submodules: Any) -> ModuleSpec:
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=_NORM,
            self_attention=ModuleSpec(
                module=attention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=submodules,
            ),
            self_attn_bda=get_bias_dropout_add,
        ),
    )


def _feed_forward(layer: type, mlp: Any) -> ModuleSpec:
    return ModuleSpec(
        module=layer,
        submodules=TransformerLayerSubmodules(
            pre_mlp_layernorm=_NORM, mlp=mlp, mlp_bda=get_bias_dropout_add
        ),
    )
