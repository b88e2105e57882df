"""More families of causal text models: what they do to scores, norms, positions and projections."""

from __future__ import annotations

import transformers as hf
from family import ENDS, KV, KVH, PLAIN, TEXT, family, text
from seen import Case

TURNS = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
OLD = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32, "vocab_size": 50}


def llama_like(model, **more) -> Case:
    return text(model, "layers", "self_attn.o_proj", **more)


@family
def qwen2() -> Case:
    """Grouped queries, biases of queries, keys and values."""
    return llama_like(hf.Qwen2Model(hf.Qwen2Config(**KV)))


@family
def phi() -> Case:
    """Partly rotary, attention and MLP in parallel, one norm for both."""
    return text(hf.PhiModel(hf.PhiConfig(**PLAIN)), "layers", "self_attn.dense", with_mid=False)


@family
def phi3() -> Case:
    """Fused query, key and value, fused gate and up, grouped queries."""
    return llama_like(hf.Phi3Model(hf.Phi3Config(**KV)))


@family
def starcoder2() -> Case:
    """Grouped queries, layer norms, no gate."""
    return llama_like(hf.Starcoder2Model(hf.Starcoder2Config(**KV, sliding_window=4)))


@family
def stablelm() -> Case:
    """Partly rotary, norms of each head's queries and keys."""
    return llama_like(hf.StableLmModel(hf.StableLmConfig(**KV, qk_layernorm=True)))


@family
def stablelm_parallel() -> Case:
    """Partly rotary, attention and MLP in parallel."""
    return llama_like(hf.StableLmModel(hf.StableLmConfig(**KV, use_parallel_residual=True)), with_mid=False)


@family
def olmo() -> Case:
    """Norms without parameters, clipped queries, keys and values."""
    return llama_like(hf.OlmoModel(hf.OlmoConfig(**PLAIN, clip_qkv=8.0)))


@family
def olmo3() -> Case:
    """Sliding and full windows in turn, norms after the sublayers."""
    return llama_like(hf.Olmo3Model(hf.Olmo3Config(**KV, **TURNS)), with_read=False)


@family
def granite() -> Case:
    """A scale of its own for scores, embeddings and branches."""
    config = hf.GraniteConfig(**KV, attention_multiplier=0.2, residual_multiplier=0.5, embedding_multiplier=3.0)
    return llama_like(hf.GraniteModel(config))


@family
def glm() -> Case:
    """Half of each head rotary, fused gate and up."""
    return llama_like(hf.GlmModel(hf.GlmConfig(**KVH)))


@family
def glm4() -> Case:
    """Half of each head rotary, norms on both sides of the sublayers."""
    return llama_like(hf.Glm4Model(hf.Glm4Config(**KVH)))


@family
def cohere2() -> Case:
    """Sliding windows with rotary positions and full ones with none, attention and MLP in parallel."""
    return llama_like(hf.Cohere2Model(hf.Cohere2Config(**KV, **TURNS)), with_mid=False)


@family
def gemma() -> Case:
    """One key and value head, heads wider than their share of the stream."""
    config = hf.GemmaConfig(**PLAIN, num_key_value_heads=1, head_dim=16)
    return llama_like(hf.GemmaModel(config))


@family
def gemma3n() -> Case:
    """Several copies of the stream, embeddings for each layer, sliding and full windows in turn."""
    config = hf.Gemma3nTextConfig(
        **KVH,
        **TURNS,
        vocab_size_per_layer_input=50,
        hidden_size_per_layer_input=8,
        altup_num_inputs=2,
        num_kv_shared_layers=0,
        laurel_rank=4,
        activation_sparsity_pattern=[0.0, 0.0],
    )
    says = ("the stream of decoder has the shape (2, 3, 9, 32)",)
    return llama_like(hf.Gemma3nTextModel(config), with_mid=False, with_read=False, says=says)


@family
def smollm3() -> Case:
    """Rotary positions in some layers and none in others."""
    return llama_like(hf.SmolLM3Model(hf.SmolLM3Config(**KV, no_rope_layers=[1, 0])))


@family
def ernie4_5() -> Case:
    """Rotary positions by pairs of neighbours."""
    return llama_like(hf.Ernie4_5Model(hf.Ernie4_5Config(**KVH)))


@family
def exaone4() -> Case:
    """Norms after the sublayers, sliding windows and full layers without positions in turn."""
    return llama_like(hf.Exaone4Model(hf.Exaone4Config(**KV, **TURNS)), with_read=False)


@family
def helium() -> Case:
    """Grouped queries, rotary by pairs."""
    return llama_like(hf.HeliumModel(hf.HeliumConfig(**KVH)))


@family
def nemotron() -> Case:
    """Squared rectifier, norms whose scale is one plus a parameter."""
    return llama_like(hf.NemotronModel(hf.NemotronConfig(**KV)))


@family
def persimmon() -> Case:
    """Fused query, key and value by head, norms of queries and keys."""
    return text(hf.PersimmonModel(hf.PersimmonConfig(**PLAIN)), "layers", "self_attn.dense")


@family
def codegen() -> Case:
    """Fused query, value and key in shards, attention and MLP in parallel, maps made by the model."""
    config = hf.CodeGenConfig(**ENDS, **OLD, rotary_dim=4, n_ctx=32)
    return text(hf.CodeGenModel(config), "h", "attn.out_proj", with_mid=False, kernel="softmax")


@family
def biogpt() -> Case:
    """Learned positions, scaled embeddings."""
    return text(hf.BioGptModel(hf.BioGptConfig(**PLAIN)), "layers", "self_attn.out_proj")


@family
def xglm() -> Case:
    """Sine positions, heads folded into the batch, maps made by the model."""
    config = hf.XGLMConfig(**ENDS, vocab_size=50, d_model=32, ffn_dim=64, num_layers=2, attention_heads=4)
    return text(hf.XGLMModel(config), "layers", "self_attn.out_proj", kernel="softmax")


@family
def ctrl() -> Case:
    """Sine positions, separate projections without rotary."""
    config = hf.CTRLConfig(**ENDS, **OLD, dff=64)
    return text(hf.CTRLModel(config), "h", "multi_head_attention.dense")


@family
def openai_gpt() -> Case:
    """Post-norm and causal, maps made by the model."""
    config = hf.OpenAIGPTConfig(**OLD)
    return text(hf.OpenAIGPTModel(config), "h", "attn.c_proj", cache=False, kernel="softmax", with_read=False)


@family
def gpt_bigcode() -> Case:
    """One key and value head, fused projection."""
    return text(hf.GPTBigCodeModel(hf.GPTBigCodeConfig(**ENDS, **OLD)), "h", "attn.c_proj")


@family
def hunyuan() -> Case:
    """Norms of queries and keys after the rotation."""
    return llama_like(hf.HunYuanDenseV1Model(hf.HunYuanDenseV1Config(**KVH)))


@family
def seed_oss() -> Case:
    """Heads wider than their share of the stream, biases of queries, keys and values."""
    return llama_like(hf.SeedOssModel(hf.SeedOssConfig(**KV, head_dim=16)))


@family
def apertus() -> Case:
    """Norms of queries and keys, an activation with parameters."""
    return llama_like(hf.ApertusModel(hf.ApertusConfig(**KV)))


@family
def arcee() -> Case:
    """Squared rectifier, no gate."""
    return llama_like(hf.ArceeModel(hf.ArceeConfig(**KV)))


@family
def diffllama() -> Case:
    """Differential attention: two maps, subtracted after their values."""
    case = llama_like(hf.DiffLlamaModel(hf.DiffLlamaConfig(**KV)))
    case.projections = {}
    return case


@family
def bitnet() -> Case:
    """A norm between the heads and their projection."""
    case = llama_like(hf.BitNetModel(hf.BitNetConfig(**KV)))
    case.projections = {("decoder", "self"): "self_attn.attn_sub_norm"}
    return case


@family
def doge() -> Case:
    """A learned bias by key, branches added to a scaled stream."""
    return llama_like(hf.DogeModel(hf.DogeConfig(**KVH)))


@family
def vaultgemma() -> Case:
    """Soft-cap, sliding and full windows in turn, maps made by the model."""
    return llama_like(hf.VaultGemmaModel(hf.VaultGemmaConfig(**KVH, **TURNS)), kernel="softmax")


@family
def gpt_neox_japanese() -> Case:
    """Bias of the projection added with dropout, maps made by the model."""
    sizes = {name: size for name, size in PLAIN.items() if name != "intermediate_size"}
    config = hf.GPTNeoXJapaneseConfig(**sizes, intermediate_multiple_size=2)
    return text(hf.GPTNeoXJapaneseModel(config), "layers", "attention.dense", kernel="softmax")


@family
def modernbert_decoder() -> Case:
    """Sliding and full windows in turn, no norm before the first attention."""
    config = hf.ModernBertDecoderConfig(**PLAIN, local_attention=4, cls_token_id=1, sep_token_id=2)
    return text(hf.ModernBertDecoderModel(config), "layers", "attn.Wo")


@family
def lfm2() -> Case:
    """Short convolutions and attention in turn, norms of queries and keys."""
    config = hf.Lfm2Config(**KV, layer_types=["conv", "full_attention"], block_ff_dim=64)
    return text(hf.Lfm2Model(config), "layers", "self_attn.out_proj")


@family
def nanochat() -> Case:
    """Norms without parameters, of queries and keys too, after the rotation."""
    return llama_like(hf.NanoChatModel(hf.NanoChatConfig(**KV)))


@family
def longcat_flash() -> Case:
    """Two attention calls in a layer, latent attention, experts beside the second."""
    config = hf.LongcatFlashConfig(
        **{name: size for name, size in TEXT.items() if name not in ("num_hidden_layers", "intermediate_size")},
        **ENDS,
        num_hidden_layers=4,
        num_layers=2,
        ffn_hidden_size=64,
        q_lora_rank=16,
        kv_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=8,
        v_head_dim=8,
        head_dim=4,
        moe_topk=2,
        n_routed_experts=4,
        zero_expert_num=1,
        expert_ffn_hidden_size=16,
        num_key_value_heads=4,
    )
    case = text(hf.LongcatFlashModel(config), "layers", "self_attn.0.o_proj", with_mid=False)
    case.projections["decoder", "self.1"] = "self_attn.1.o_proj"
    return case
