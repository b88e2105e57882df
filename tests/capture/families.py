"""Small random Hugging Face models of every family that capture must see into."""

from __future__ import annotations

from collections.abc import Callable

import torch
import transformers as hf
from seen import Case

TEXT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 50}
IMAGE = {name: value for name, value in TEXT.items() if name != "vocab_size"} | {"image_size": 16, "patch_size": 4}
ENDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def ids(sequences: int = 3, tokens: int = 9, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 50, (sequences, tokens), generator=torch.Generator().manual_seed(seed))


def floats(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def _text(model, blocks: str, projection: str, *, name: str = "decoder", cache: bool = True, **more) -> Case:
    batch = {"input_ids": ids()} | ({"use_cache": False} if cache else {})
    causal = frozenset({name}) if name == "decoder" else frozenset()
    paths = {name: [f"{blocks}.0", f"{blocks}.1"]}
    return Case(model, batch, paths, {name: 4}, {(name, "self"): projection}, causal, **more)


def bert() -> Case:
    model = hf.BertModel(hf.BertConfig(**TEXT))
    return _text(model, "encoder.layer", "attention.output.dense", name="encoder", cache=False, with_read=False)


def albert() -> Case:
    case = _text(
        hf.AlbertModel(hf.AlbertConfig(**TEXT, embedding_size=16)),
        "encoder.albert_layer_groups",
        "albert_layers.0.attention.dense",
        name="encoder",
        cache=False,
        with_read=False,
    )
    case.blocks = {"encoder": ["encoder.albert_layer_groups.0"] * 2}
    return case


def gpt2() -> Case:
    config = hf.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=50, **ENDS)
    return _text(hf.GPT2Model(config), "h", "attn.c_proj")


def llama() -> Case:
    return _text(hf.LlamaModel(hf.LlamaConfig(**TEXT, num_key_value_heads=2)), "layers", "self_attn.o_proj")


def llama_padded() -> Case:
    case = llama()
    case.batch["attention_mask"] = torch.tensor([[0] * 3 + [1] * 6, [1] * 9, [0] + [1] * 8])
    return case


def mistral() -> Case:
    config = hf.MistralConfig(**TEXT, num_key_value_heads=2, sliding_window=4)
    return _text(hf.MistralModel(config), "layers", "self_attn.o_proj")


def mixtral() -> Case:
    config = hf.MixtralConfig(**TEXT, num_key_value_heads=2, num_local_experts=4)
    return _text(hf.MixtralModel(config), "layers", "self_attn.o_proj")


def gpt_neox() -> Case:
    return _text(hf.GPTNeoXModel(hf.GPTNeoXConfig(**TEXT, **ENDS)), "layers", "attention.dense", with_mid=False)


def falcon() -> Case:
    config = hf.FalconConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=50, **ENDS)
    return _text(hf.FalconModel(config), "h", "self_attention.dense", with_mid=False)


def gptj() -> Case:
    config = hf.GPTJConfig(n_embd=32, n_layer=2, n_head=4, vocab_size=50, rotary_dim=4, **ENDS)
    return _text(hf.GPTJModel(config), "h", "attn.out_proj", with_mid=False, kernel="softmax")


def bloom() -> Case:
    config = hf.BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=50)
    return _text(hf.BloomModel(config), "h", "self_attention.dense", kernel="softmax")


def gemma2() -> Case:
    config = hf.Gemma2Config(**TEXT, num_key_value_heads=2, head_dim=8, sliding_window=4)
    return _text(hf.Gemma2Model(config), "layers", "self_attn.o_proj", kernel="softmax")


def llama_eager() -> Case:
    config = hf.LlamaConfig(**TEXT, num_key_value_heads=2, attn_implementation="eager")
    return _text(hf.LlamaModel(config), "layers", "self_attn.o_proj", kernel="softmax")


def gpt_oss() -> Case:
    config = hf.GptOssConfig(
        **TEXT, num_key_value_heads=2, head_dim=8, num_local_experts=4, num_experts_per_tok=2, sliding_window=4, **ENDS
    )
    return _text(hf.GptOssModel(config), "layers", "self_attn.o_proj", kernel="softmax")


def cohere() -> Case:
    config = hf.CohereConfig(**TEXT, num_key_value_heads=2, **ENDS)
    return _text(hf.CohereModel(config), "layers", "self_attn.o_proj", with_mid=False)


def deberta() -> Case:
    return _text(
        hf.DebertaModel(hf.DebertaConfig(**TEXT)),
        "encoder.layer",
        "attention.output.dense",
        name="encoder",
        cache=False,
        kernel="softmax",
        with_read=False,
    )


def deepseek() -> Case:
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
    return _text(hf.DeepseekV3Model(config), "layers", "self_attn.o_proj")


def jamba() -> Case:
    config = hf.JambaConfig(
        **TEXT,
        num_key_value_heads=2,
        use_mamba_kernels=False,
        attn_layer_period=2,
        attn_layer_offset=1,
        mamba_d_state=4,
        num_experts=2,
        expert_layer_period=2,
        expert_layer_offset=1,
    )
    return _text(hf.JambaModel(config), "layers", "self_attn.o_proj")


def xlnet() -> Case:
    config = hf.XLNetConfig(d_model=32, n_layer=2, n_head=4, d_inner=64, vocab_size=50)
    case = _text(hf.XLNetModel(config), "layer", "", name="encoder", cache=False, kernel="softmax", with_read=False)
    case.projections = {}
    return case


def vit() -> Case:
    model = hf.ViTModel(hf.ViTConfig(**IMAGE))
    batch = {"pixel_values": floats(2, 3, 16, 16)}
    return Case(
        model, batch, {"vision": ["layers.0", "layers.1"]}, {"vision": 4}, {("vision", "self"): "attention.o_proj"}
    )


def swin() -> Case:
    config = hf.SwinConfig(image_size=32, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4)
    blocks = [f"encoder.layers.{stage}.blocks.{block}" for stage in range(2) for block in range(2)]
    batch = {"pixel_values": floats(2, 3, 32, 32)}
    return Case(
        hf.SwinModel(config), batch, {"vision": blocks}, {"vision": 2}, {("vision", "self"): "attention.o_proj"}
    )


def clip() -> Case:
    text = {**TEXT, "max_position_embeddings": 16, "eos_token_id": 2}
    model = hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=IMAGE, projection_dim=16))
    return Case(
        model,
        {"input_ids": ids(2), "pixel_values": floats(2, 3, 16, 16)},
        {
            "vision": [f"vision_model.encoder.layers.{i}" for i in range(2)],
            "decoder": [f"text_model.encoder.layers.{i}" for i in range(2)],
        },
        {"vision": 4, "decoder": 4},
        {("vision", "self"): "self_attn.out_proj", ("decoder", "self"): "self_attn.out_proj"},
        frozenset({"decoder"}),
    )


def _pair(model, blocks: str, own: str, cross: str, batch: dict, *, prefix: str = "", **more) -> Case:
    return Case(
        model,
        batch | {"use_cache": False},
        {name: [f"{prefix}{name}.{blocks}.{i}" for i in range(2)] for name in ("encoder", "decoder")},
        {"encoder": 4, "decoder": 4},
        {("encoder", "self"): own, ("decoder", "self"): own, ("decoder", "cross"): cross},
        frozenset({"decoder"}),
        **more,
    )


def t5() -> Case:
    config = hf.T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=50)
    batch = {
        "input_ids": ids(),
        "decoder_input_ids": ids(3, 7),
        "attention_mask": torch.tensor([[1] * 9, [1] * 6 + [0] * 3, [1] * 9]),
    }
    return _pair(hf.T5Model(config), "block", "layer.0.SelfAttention.o", "layer.1.EncDecAttention.o", batch)


_PAIR = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "vocab_size": 50,
}


def bart() -> Case:
    config = hf.BartConfig(**_PAIR, **ENDS, decoder_start_token_id=1, forced_eos_token_id=2)
    batch = {"input_ids": ids(), "decoder_input_ids": ids(3, 7)}
    return _pair(hf.BartModel(config), "layers", "self_attn.out_proj", "encoder_attn.out_proj", batch, with_read=False)


def whisper() -> Case:
    config = hf.WhisperConfig(
        **_PAIR,
        **ENDS,
        num_mel_bins=8,
        max_source_positions=10,
        decoder_start_token_id=1,
        suppress_tokens=[],
        begin_suppress_tokens=[],
    )
    batch = {"input_features": floats(2, 8, 20), "decoder_input_ids": ids(2, 7)}
    return _pair(hf.WhisperModel(config), "layers", "self_attn.out_proj", "encoder_attn.out_proj", batch)


def qwen3() -> Case:
    return _text(hf.Qwen3Model(hf.Qwen3Config(**TEXT, num_key_value_heads=2, head_dim=8)), "layers", "self_attn.o_proj")


def gemma3() -> Case:
    kinds = ["sliding_attention", "full_attention"]
    config = hf.Gemma3TextConfig(**TEXT, num_key_value_heads=2, head_dim=8, sliding_window=4, layer_types=kinds)
    return _text(hf.Gemma3TextModel(config), "layers", "self_attn.o_proj")


def olmo2() -> Case:
    model = hf.Olmo2Model(hf.Olmo2Config(**TEXT, **ENDS))
    return _text(model, "layers", "self_attn.o_proj", with_read=False)


def opt() -> Case:
    config = hf.OPTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=64,
        vocab_size=50,
        word_embed_proj_dim=32,
        **ENDS,
    )
    return _text(hf.OPTModel(config), "decoder.layers", "self_attn.out_proj")


def mpt() -> Case:
    config = hf.MptConfig(d_model=32, n_layers=2, n_heads=4, vocab_size=50)
    return _text(hf.MptModel(config), "blocks", "attn.out_proj", kernel="softmax")


def gpt_neo() -> Case:
    kinds = [[["global", "local"], 1]]
    config = hf.GPTNeoConfig(
        hidden_size=32, num_layers=2, num_heads=4, vocab_size=50, attention_types=kinds, window_size=4, **ENDS
    )
    return _text(hf.GPTNeoModel(config), "h", "attn.attention.out_proj", kernel="softmax")


def falcon_alibi() -> Case:
    config = hf.FalconConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=50, alibi=True, **ENDS
    )
    return _text(hf.FalconModel(config), "h", "self_attention.dense", with_mid=False)


def modernbert() -> Case:
    config = hf.ModernBertConfig(**TEXT, **ENDS, local_attention=4, cls_token_id=1, sep_token_id=2)
    return _text(hf.ModernBertModel(config), "layers", "attn.Wo", name="encoder", cache=False)


def distilbert() -> Case:
    config = hf.DistilBertConfig(dim=32, n_layers=2, n_heads=4, hidden_dim=64, vocab_size=50)
    return _text(
        hf.DistilBertModel(config),
        "transformer.layer",
        "attention.out_lin",
        name="encoder",
        cache=False,
        with_read=False,
    )


def deberta_v2() -> Case:
    config = hf.DebertaV2Config(**TEXT, relative_attention=True, pos_att_type=["p2c", "c2p"])
    return _text(
        hf.DebertaV2Model(config),
        "encoder.layer",
        "attention.output.dense",
        name="encoder",
        cache=False,
        kernel="softmax",
        with_read=False,
    )


def dinov2() -> Case:
    config = hf.Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=4)
    blocks = {"vision": ["encoder.layer.0", "encoder.layer.1"]}
    batch = {"pixel_values": floats(2, 3, 16, 16)}
    return Case(hf.Dinov2Model(config), batch, blocks, {"vision": 4}, {("vision", "self"): "attention.o_proj"})


def switch() -> Case:
    config = hf.SwitchTransformersConfig(
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_decoder_layers=2,
        num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1,
        num_heads=4,
        num_experts=4,
        vocab_size=50,
    )
    batch = {"input_ids": ids(), "decoder_input_ids": ids(3, 7)}
    model = hf.SwitchTransformersModel(config)
    own, cross = "layer.0.SelfAttention.o", "layer.1.EncDecAttention.o"
    return _pair(model, "block", own, cross, batch, kernel="softmax")


FAMILIES: dict[str, Callable[[], Case]] = {
    build.__name__: build
    for build in (
        albert,
        bart,
        bert,
        bloom,
        clip,
        cohere,
        deberta,
        deepseek,
        falcon,
        gemma2,
        gpt2,
        gpt_neox,
        gpt_oss,
        gptj,
        jamba,
        llama,
        llama_eager,
        llama_padded,
        mistral,
        mixtral,
        swin,
        t5,
        vit,
        whisper,
        qwen3,
        gemma3,
        olmo2,
        opt,
        mpt,
        gpt_neo,
        falcon_alibi,
        modernbert,
        distilbert,
        deberta_v2,
        dinov2,
        switch,
        xlnet,
    )
}


def build(family: str) -> Case:
    """A case in evaluation mode, its matrices drawn large enough that attention is not uniform."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        case = FAMILIES[family]()
        with torch.no_grad():
            for parameter in case.model.parameters():
                if parameter.ndim == 2:
                    parameter.normal_(0, 0.3)
    case.model.eval()
    return case
