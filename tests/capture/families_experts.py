"""Families of causal text models with experts, latent keys and values, or linear attention between."""

from __future__ import annotations

import transformers as hf
from families_decoders import llama_like
from family import KV, KVH, PLAIN, family, text
from seen import Case

FEW = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LATENT = {"kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "num_key_value_heads": 4}


@family
def qwen2_moe() -> Case:
    """Experts with a gated shared one."""
    return llama_like(hf.Qwen2MoeModel(hf.Qwen2MoeConfig(**KV, **FEW, shared_expert_intermediate_size=32)))


@family
def qwen3_moe() -> Case:
    """Experts, norms of queries and keys."""
    return llama_like(hf.Qwen3MoeModel(hf.Qwen3MoeConfig(**KVH, **FEW)))


@family
def phimoe() -> Case:
    """Two experts chosen in turn, layer norms."""
    return llama_like(hf.PhimoeModel(hf.PhimoeConfig(**KV, num_local_experts=4)))


@family
def olmoe() -> Case:
    """Experts, norms of all queries and keys together."""
    return llama_like(hf.OlmoeModel(hf.OlmoeConfig(**PLAIN, num_experts=4, num_experts_per_tok=2)))


@family
def granitemoe() -> Case:
    """Experts, a scale of its own for the scores."""
    return llama_like(hf.GraniteMoeModel(hf.GraniteMoeConfig(**KV, num_local_experts=4, attention_multiplier=0.2)))


@family
def glm4_moe() -> Case:
    """Grouped experts after a dense layer, biases of queries, keys and values."""
    config = hf.Glm4MoeConfig(
        **KVH,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
    )
    return llama_like(hf.Glm4MoeModel(config))


@family
def hunyuan_moe() -> Case:
    """Experts with a shared MLP, norms of queries and keys after the rotation."""
    return llama_like(hf.HunYuanMoEV1Model(hf.HunYuanMoEV1Config(**KVH, num_experts=4, moe_topk=2)))


@family
def deepseek_v2() -> Case:
    """Latent attention with full queries, value width unlike key width."""
    config = hf.DeepseekV2Config(
        **PLAIN,
        **LATENT,
        q_lora_rank=None,
        v_head_dim=16,
        moe_intermediate_size=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
    )
    return llama_like(hf.DeepseekV2Model(config))


@family
def minicpm3() -> Case:
    """Latent attention, scaled branches, no experts."""
    return llama_like(hf.MiniCPM3Model(hf.MiniCPM3Config(**PLAIN, **LATENT, q_lora_rank=16, v_head_dim=8)))


@family
def llama4() -> Case:
    """Attention within chunks and over all in turn, experts weighted before they act."""
    config = hf.Llama4TextConfig(
        **KVH,
        num_local_experts=4,
        intermediate_size_mlp=64,
        num_experts_per_tok=1,
        attention_chunk_size=4,
        layer_types=["chunked_attention", "full_attention"],
    )
    return llama_like(hf.Llama4TextModel(config))


@family
def jetmoe() -> Case:
    """Experts for queries and outputs of the heads, shared keys and values."""
    config = hf.JetMoeConfig(
        hidden_size=32,
        num_hidden_layers=2,
        vocab_size=50,
        num_key_value_heads=2,
        kv_channels=8,
        intermediate_size=32,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    case = text(hf.JetMoeModel(config), "layers", "")
    case.projections = {}
    return case


@family
def minimax() -> Case:
    """Linear attention and softmax attention in turn, post-norm with weights on both sides of each sum."""
    config = hf.MiniMaxConfig(
        **KVH, num_local_experts=4, layer_types=["linear_attention", "full_attention"], block_size=4
    )
    return llama_like(hf.MiniMaxModel(config), with_read_mid=False)


@family
def dbrx() -> Case:
    """Fused and clipped query, key and value, experts in one tensor."""
    config = hf.DbrxConfig(
        d_model=32,
        n_heads=4,
        n_layers=2,
        max_seq_len=32,
        vocab_size=50,
        attn_config={"kv_n_heads": 2, "clip_qkv": 8.0},
        ffn_config={"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
    )
    config.attn_config.rope_theta = 10000.0
    return text(hf.DbrxModel(config), "blocks", "norm_attn_norm.attn.out_proj")
