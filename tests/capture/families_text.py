"""Families of text models: decoders and encoders."""

from __future__ import annotations

import torch
import transformers as hf
from family import ENDS, TEXT, family, text
from seen import Case


@family
def bert() -> Case:
    """Bidirectional, learned positions, post-norm."""
    model = hf.BertModel(hf.BertConfig(**TEXT))
    return text(model, "encoder.layer", "attention.output.dense", name="encoder", cache=False, with_read=False)


@family
def albert() -> Case:
    """One block shared by all layers, post-norm."""
    case = text(
        hf.AlbertModel(hf.AlbertConfig(**TEXT, embedding_size=16)),
        "encoder.albert_layer_groups",
        "albert_layers.0.attention.dense",
        name="encoder",
        cache=False,
        with_read=False,
    )
    case.blocks = {"encoder": ["encoder.albert_layer_groups.0"] * 2}
    return case


@family
def gpt2() -> Case:
    """Fused query, key and value, learned positions."""
    config = hf.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=50, **ENDS)
    return text(hf.GPT2Model(config), "h", "attn.c_proj")


@family
def llama() -> Case:
    """Grouped queries, rotary."""
    return text(hf.LlamaModel(hf.LlamaConfig(**TEXT, num_key_value_heads=2)), "layers", "self_attn.o_proj")


@family
def llama_padded() -> Case:
    """Grouped queries, padded on the left."""
    case = llama()
    case.batch["attention_mask"] = torch.tensor([[0] * 3 + [1] * 6, [1] * 9, [0] + [1] * 8])
    return case


@family
def mistral() -> Case:
    """Sliding window, grouped queries."""
    config = hf.MistralConfig(**TEXT, num_key_value_heads=2, sliding_window=4)
    return text(hf.MistralModel(config), "layers", "self_attn.o_proj")


@family
def mixtral() -> Case:
    """Experts, grouped queries."""
    config = hf.MixtralConfig(**TEXT, num_key_value_heads=2, num_local_experts=4)
    return text(hf.MixtralModel(config), "layers", "self_attn.o_proj")


@family
def gpt_neox() -> Case:
    """Partly rotary, attention and MLP in parallel."""
    return text(hf.GPTNeoXModel(hf.GPTNeoXConfig(**TEXT, **ENDS)), "layers", "attention.dense", with_mid=False)


@family
def falcon() -> Case:
    """One key and value head, attention and MLP in parallel, kernel called directly."""
    config = hf.FalconConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=50, **ENDS)
    return text(hf.FalconModel(config), "h", "self_attention.dense", with_mid=False)


@family
def gptj() -> Case:
    """Rotary, attention and MLP in parallel, maps made by the model."""
    config = hf.GPTJConfig(n_embd=32, n_layer=2, n_head=4, vocab_size=50, rotary_dim=4, **ENDS)
    return text(hf.GPTJModel(config), "h", "attn.out_proj", with_mid=False, kernel="softmax")


@family
def bloom() -> Case:
    """ALiBi added to the scores, maps made by the model."""
    config = hf.BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=50)
    return text(hf.BloomModel(config), "h", "self_attention.dense", kernel="softmax")


@family
def gemma2() -> Case:
    """Soft-capped logits, sliding and full windows in turn, norms on both sides."""
    config = hf.Gemma2Config(**TEXT, num_key_value_heads=2, head_dim=8, sliding_window=4)
    return text(hf.Gemma2Model(config), "layers", "self_attn.o_proj", kernel="softmax")


@family
def llama_eager() -> Case:
    """Grouped queries, maps made by the model."""
    config = hf.LlamaConfig(**TEXT, num_key_value_heads=2, attn_implementation="eager")
    return text(hf.LlamaModel(config), "layers", "self_attn.o_proj", kernel="softmax")


@family
def gpt_oss() -> Case:
    """Learned sinks, sliding windows, experts."""
    config = hf.GptOssConfig(
        **TEXT, num_key_value_heads=2, head_dim=8, num_local_experts=4, num_experts_per_tok=2, sliding_window=4, **ENDS
    )
    return text(hf.GptOssModel(config), "layers", "self_attn.o_proj", kernel="softmax")


@family
def cohere() -> Case:
    """Attention and MLP in parallel, grouped queries."""
    config = hf.CohereConfig(**TEXT, num_key_value_heads=2, **ENDS)
    return text(hf.CohereModel(config), "layers", "self_attn.o_proj", with_mid=False)


@family
def deberta() -> Case:
    """Disentangled relative attention, post-norm."""
    return text(
        hf.DebertaModel(hf.DebertaConfig(**TEXT)),
        "encoder.layer",
        "attention.output.dense",
        name="encoder",
        cache=False,
        kernel="softmax",
        with_read=False,
    )


@family
def deepseek() -> Case:
    """Latent attention, value width unlike key width, experts with a shared one."""
    config = hf.DeepseekV3Config(
        **TEXT,
        num_key_value_heads=4,
        moe_intermediate_size=16,
        q_lora_rank=16,
        kv_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=8,
        v_head_dim=8,
        n_routed_experts=4,
        n_group=1,
        topk_group=1,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
    )
    return text(hf.DeepseekV3Model(config), "layers", "self_attn.o_proj")


@family
def xlnet() -> Case:
    """Relative positions, tokens before sequences in the stream."""
    config = hf.XLNetConfig(d_model=32, n_layer=2, n_head=4, d_inner=64, vocab_size=50, initializer_range=0.3)
    case = text(hf.XLNetModel(config), "layer", "", name="encoder", cache=False, kernel="softmax", with_read=False)
    case.projections = {}
    return case


@family
def qwen3() -> Case:
    """Grouped queries, norms of queries and keys."""
    return text(hf.Qwen3Model(hf.Qwen3Config(**TEXT, num_key_value_heads=2, head_dim=8)), "layers", "self_attn.o_proj")


@family
def gemma3() -> Case:
    """Sliding and full windows in turn, norms of queries and keys, norms on both sides."""
    kinds = ["sliding_attention", "full_attention"]
    config = hf.Gemma3TextConfig(**TEXT, num_key_value_heads=2, head_dim=8, sliding_window=4, layer_types=kinds)
    return text(hf.Gemma3TextModel(config), "layers", "self_attn.o_proj")


@family
def olmo2() -> Case:
    """Norms of queries and keys, norms after the sublayers."""
    model = hf.Olmo2Model(hf.Olmo2Config(**TEXT, **ENDS))
    return text(model, "layers", "self_attn.o_proj", with_read=False)


@family
def opt() -> Case:
    """Learned positions with an offset."""
    config = hf.OPTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=64,
        vocab_size=50,
        word_embed_proj_dim=32,
        **ENDS,
    )
    return text(hf.OPTModel(config), "decoder.layers", "self_attn.out_proj")


@family
def mpt() -> Case:
    """ALiBi, maps made by the model."""
    config = hf.MptConfig(d_model=32, n_layers=2, n_heads=4, vocab_size=50)
    return text(hf.MptModel(config), "blocks", "attn.out_proj", kernel="softmax")


@family
def gpt_neo() -> Case:
    """Local and global attention in turn, unscaled scores."""
    kinds = [[["global", "local"], 1]]
    config = hf.GPTNeoConfig(
        hidden_size=32, num_layers=2, num_heads=4, vocab_size=50, attention_types=kinds, window_size=4, **ENDS
    )
    return text(hf.GPTNeoModel(config), "h", "attn.attention.out_proj", kernel="softmax")


@family
def falcon_alibi() -> Case:
    """ALiBi, attention and MLP in parallel, kernel called directly."""
    config = hf.FalconConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=50, alibi=True, **ENDS
    )
    return text(hf.FalconModel(config), "h", "self_attention.dense", with_mid=False)


@family
def modernbert() -> Case:
    """Bidirectional, local windows and global layers in turn, rotary."""
    config = hf.ModernBertConfig(**TEXT, **ENDS, local_attention=4, cls_token_id=1, sep_token_id=2)
    return text(hf.ModernBertModel(config), "layers", "attn.Wo", name="encoder", cache=False)


@family
def distilbert() -> Case:
    """Bidirectional, post-norm."""
    config = hf.DistilBertConfig(dim=32, n_layers=2, n_heads=4, hidden_dim=64, vocab_size=50)
    return text(
        hf.DistilBertModel(config),
        "transformer.layer",
        "attention.out_lin",
        name="encoder",
        cache=False,
        with_read=False,
    )


@family
def deberta_v2() -> Case:
    """Disentangled attention, heads folded into the batch, post-norm."""
    config = hf.DebertaV2Config(**TEXT, relative_attention=True, pos_att_type=["p2c", "c2p"])
    return text(
        hf.DebertaV2Model(config),
        "encoder.layer",
        "attention.output.dense",
        name="encoder",
        cache=False,
        kernel="softmax",
        with_read=False,
    )
