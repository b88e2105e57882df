"""State spaces, recurrences and linear attention, alone and between blocks that attend."""

from __future__ import annotations

from typing import Any

import transformers as hf
from family import ENDS, TEXT, family, ids
from seen import Case

BATCH = {"input_ids": ids(3, 8), "use_cache": False}
BETWEEN = ("no state between attention and MLP",)
SMALL: dict[str, Any] = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2} | ENDS


def hybrid(model, projection: str, *, blocks: str = "layers", count: int = 2, **more) -> Case:
    paths = {"decoder": [f"{blocks}.{layer}" for layer in range(count)]}
    projections = {("decoder", "self"): projection} if projection else {}
    return Case(model, dict(BATCH), paths, {"decoder": 4}, projections, frozenset({"decoder"}), **more)


def recurrent(model, blocks: str = "layers", count: int = 2, **more) -> Case:
    paths = {"backbone": [f"{blocks}.{layer}" for layer in range(count)]}
    return Case(model, dict(BATCH), paths, {}, {}, kernel=None, says=("no token attention was seen",), **more)


@family
def mamba() -> Case:
    """State spaces alone."""
    return recurrent(hf.MambaModel(hf.MambaConfig(**SMALL, state_size=4)))


@family
def mamba2() -> Case:
    """State spaces by chunks."""
    config = hf.Mamba2Config(**SMALL, state_size=4, num_heads=8, head_dim=8, n_groups=1, chunk_size=4)
    return recurrent(hf.Mamba2Model(config))


@family
def rwkv() -> Case:
    """Weighted sums of the past with learned decay."""
    return recurrent(hf.RwkvModel(hf.RwkvConfig(**SMALL, context_length=32)), "blocks")


@family
def xlstm() -> Case:
    """Matrix memories."""
    return recurrent(hf.xLSTMModel(hf.xLSTMConfig(**SMALL, num_heads=4, chunk_size=4)), "blocks")


@family
def zamba() -> Case:
    """State spaces; one attention block, shared by every third layer, reads the embeddings beside the stream."""
    sizes = TEXT | ENDS | {"num_hidden_layers": 6, "num_key_value_heads": 4}
    config = hf.ZambaConfig(
        **sizes,
        attn_layer_period=3,
        attn_layer_offset=1,
        n_mamba_heads=2,
        mamba_d_state=4,
        use_mamba_kernels=False,
    )
    return hybrid(hf.ZambaModel(config), "", count=6, with_mid=False, says=BETWEEN)


@family
def zamba2() -> Case:
    """State spaces by chunks; a shared attention block with adapters of each place's own."""
    sizes = TEXT | ENDS | {"num_hidden_layers": 4, "num_key_value_heads": 4}
    config = hf.Zamba2Config(
        **sizes,
        mamba_d_state=4,
        n_mamba_heads=8,
        mamba_headdim=8,
        mamba_ngroups=1,
        chunk_size=4,
        num_mem_blocks=1,
        layers_block_type=["mamba", "hybrid", "mamba", "hybrid"],
        adapter_rank=4,
    )
    return hybrid(hf.Zamba2Model(config), "", count=4, with_mid=False, says=BETWEEN)


@family
def falcon_h1() -> Case:
    """State space and attention beside each other in every block."""
    config = hf.FalconH1Config(
        **TEXT,
        **ENDS,
        num_key_value_heads=2,
        head_dim=8,
        mamba_d_ssm=32,
        mamba_n_heads=4,
        mamba_d_head=8,
        mamba_n_groups=1,
        mamba_d_state=4,
        mamba_chunk_size=4,
    )
    return hybrid(hf.FalconH1Model(config), "self_attn.o_proj")


@family
def bamba() -> Case:
    """State-space blocks and attention blocks in turn."""
    config = hf.BambaConfig(
        **TEXT,
        **ENDS,
        num_key_value_heads=2,
        mamba_n_heads=8,
        mamba_d_head=8,
        mamba_n_groups=1,
        mamba_d_state=4,
        mamba_chunk_size=4,
        attn_layer_indices=[1],
    )
    return hybrid(hf.BambaModel(config), "self_attn.o_proj")


@family
def recurrent_gemma() -> Case:
    """Gated linear recurrences, and local attention with one head of keys."""
    config = hf.RecurrentGemmaConfig(
        **TEXT | ENDS | {"num_hidden_layers": 3, "num_key_value_heads": 1},
        lru_width=32,
        attention_window_size=4,
        block_types=["recurrent", "recurrent", "attention"],
    )
    return hybrid(hf.RecurrentGemmaModel(config), "temporal_block.o_proj", count=3)


@family
def nemotron_h() -> Case:
    """Blocks of one branch each: state space, attention or experts."""
    config = hf.NemotronHConfig(
        **TEXT | ENDS | {"num_hidden_layers": 4, "num_key_value_heads": 2},
        head_dim=8,
        layers_block_type=["mamba", "attention", "moe", "mamba"],
        ssm_state_size=4,
        mamba_num_heads=8,
        mamba_head_dim=8,
        n_groups=1,
        chunk_size=4,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        moe_shared_expert_intermediate_size=16,
        n_group=1,
        topk_group=1,
        use_mamba_kernels=False,
    )
    return hybrid(hf.NemotronHModel(config), "mixer.o_proj", count=4, with_mid=False, says=BETWEEN)


@family
def qwen3_next() -> Case:
    """Gated delta rule and gated attention in turn, experts."""
    config = hf.Qwen3NextConfig(
        **TEXT,
        **ENDS,
        num_key_value_heads=2,
        head_dim=8,
        layer_types=["linear_attention", "full_attention"],
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
    )
    return hybrid(hf.Qwen3NextModel(config), "")
