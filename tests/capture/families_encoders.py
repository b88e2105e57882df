"""More families of bidirectional text models: norms, positions, approximations of attention, and none at all."""

from __future__ import annotations

import torch
import transformers as hf
from family import KV, PLAIN, TEXT, family, ids, refused, text
from seen import Case


def bert_like(model, projection: str = "attention.output.dense", **more) -> Case:
    options = {"with_read": False} | more
    return text(model, "encoder.layer", projection, name="encoder", cache=False, **options)


def unread(case: Case, *says: str) -> Case:
    """Attention is there, and cannot be read."""
    case.heads, case.projections, case.kernel, case.says = {}, {}, None, says
    return case


def mixing(case: Case, *says: str) -> Case:
    """A stack without attention over tokens."""
    case.blocks = {"backbone": next(iter(case.blocks.values()))}
    return unread(case, *says)


@family
def roberta() -> Case:
    """Bidirectional, positions that skip padding, post-norm."""
    return bert_like(hf.RobertaModel(hf.RobertaConfig(**PLAIN)))


@family
def xlm_roberta_xl() -> Case:
    """Bidirectional, pre-norm."""
    return bert_like(hf.XLMRobertaXLModel(hf.XLMRobertaXLConfig(**PLAIN)), with_read=True)


@family
def xmod() -> Case:
    """An adapter for each language after the MLP, post-norm."""
    return bert_like(hf.XmodModel(hf.XmodConfig(**PLAIN, languages=["en_XX"], default_language="en_XX")))


@family
def electra() -> Case:
    """Embeddings of another width, post-norm."""
    return bert_like(hf.ElectraModel(hf.ElectraConfig(**TEXT, embedding_size=16)))


@family
def mobilebert() -> Case:
    """A bottleneck around attention and stacked MLPs, norms without statistics."""
    sizes = {"embedding_size": 16, "intra_bottleneck_size": 16, "true_hidden_size": 16}
    return bert_like(hf.MobileBertModel(hf.MobileBertConfig(**TEXT, **sizes)), with_mid=False)


@family
def funnel() -> Case:
    """Queries pooled from stage to stage, then all tokens again; relative positions, maps made by the model."""
    config = hf.FunnelConfig(vocab_size=50, d_model=32, n_head=4, d_head=8, d_inner=64, block_sizes=[2, 2])
    case = bert_like(hf.FunnelModel(config), kernel="softmax")
    case.blocks = {
        "encoder": [f"encoder.blocks.{stage}.{block}" for stage in range(2) for block in range(2)],
        "encoder.1": ["decoder.layers.0", "decoder.layers.1"],
    }
    case.heads = {"encoder": 4, "encoder.1": 4}
    case.projections = {(name, "self"): "attention.post_proj" for name in case.blocks}
    return case


@family
def longformer() -> Case:
    """Banded attention with global tokens."""
    config = hf.LongformerConfig(**PLAIN, attention_window=[4, 4], sep_token_id=2)
    return unread(bert_like(hf.LongformerModel(config)), "is not multiplied with values as a plain product")


@family
def big_bird() -> Case:
    """Full attention where the text is short for blocks, post-norm."""
    config = hf.BigBirdConfig(**PLAIN, attention_type="original_full", sep_token_id=2)
    return bert_like(hf.BigBirdModel(config), kernel="softmax")


@family
def nystromformer() -> Case:
    """Landmarks: a product of three maps."""
    config = hf.NystromformerConfig(**TEXT, num_landmarks=3, segment_means_seq_len=9)
    return unread(bert_like(hf.NystromformerModel(config), with_mid=[1, 2]), "is put together from several softmaxes")


@family
def yoso() -> Case:
    """Attention by hashing, without a softmax."""
    return mixing(bert_like(hf.YosoModel(hf.YosoConfig(**TEXT))), "no token attention was seen")


@family
def mra() -> Case:
    """Attention in several resolutions, without a softmax."""
    return mixing(bert_like(hf.MraModel(hf.MraConfig(**TEXT, block_per_row=1))), "no token attention was seen")


@family
def fnet() -> Case:
    """Fourier mixing, no attention."""
    sizes = {name: size for name, size in TEXT.items() if name != "num_attention_heads"}
    return mixing(bert_like(hf.FNetModel(hf.FNetConfig(**sizes))), "no token attention was seen")


@family
def reformer() -> Case:
    """Local windows and hashed buckets in turn, two streams that are added in turn, without a softmax."""
    config = hf.ReformerConfig(
        hidden_size=32,
        num_attention_heads=4,
        attention_head_size=8,
        feed_forward_size=64,
        vocab_size=50,
        attn_layers=["local", "lsh"],
        axial_pos_embds=False,
        local_attn_chunk_length=3,
        lsh_attn_chunk_length=3,
        num_buckets=2,
        hash_seed=0,
    )
    case = text(hf.ReformerModel(config), "encoder.layers", "", name="encoder")
    return mixing(case, "no token attention was seen")


@family
def roformer() -> Case:
    """Rotary on queries, keys and not values, post-norm, maps made by the model."""
    return bert_like(hf.RoFormerModel(hf.RoFormerConfig(**TEXT)), kernel="softmax")


@family
def ibert() -> Case:
    """Layers that can be computed in integers, post-norm, maps made by the model."""
    return bert_like(hf.IBertModel(hf.IBertConfig(**PLAIN)), "attention.output", kernel="softmax", with_mid=False)


@family
def mpnet() -> Case:
    """One relative bias for all layers, post-norm, maps made by the model."""
    return bert_like(hf.MPNetModel(hf.MPNetConfig(**PLAIN)), "attention.attn.o", kernel="softmax")


@family
def convbert() -> Case:
    """Half of the heads attend, half are convolutions whose kernels depend on the token."""
    case = bert_like(hf.ConvBertModel(hf.ConvBertConfig(**TEXT, embedding_size=16)), kernel="softmax")
    case.heads, case.projections = {"encoder": 2}, {}
    return case


@family
def rembert() -> Case:
    """Embeddings of other widths at both ends, maps made by the model."""
    config = hf.RemBertConfig(**TEXT, input_embedding_size=16, output_embedding_size=16)
    return bert_like(hf.RemBertModel(config), kernel="softmax")


@family
def esm() -> Case:
    """Proteins: rotary, pre-norm, embeddings rescaled for masked tokens."""
    config = hf.EsmConfig(**PLAIN, position_embedding_type="rotary", mask_token_id=4)
    return bert_like(hf.EsmModel(config), with_read=True)


@family
def megatron_bert() -> Case:
    """Bidirectional, pre-norm, maps made by the model."""
    return bert_like(hf.MegatronBertModel(hf.MegatronBertConfig(**TEXT)), kernel="softmax", with_read=True)


@family
def layoutlm() -> Case:
    """Text with places on a page, post-norm."""
    return bert_like(hf.LayoutLMModel(hf.LayoutLMConfig(**TEXT)))


@family
def luke() -> Case:
    """Words and entities, four kinds of queries in one map."""
    config = hf.LukeConfig(**PLAIN, entity_vocab_size=10, entity_emb_size=8)
    case = bert_like(hf.LukeModel(config), kernel="softmax", with_mid=False)
    case.projections = {}
    return case


@family
def canine() -> Case:
    """Characters: attention within pieces, over pooled characters, then over all of them."""
    config = hf.CanineConfig(
        **PLAIN,
        downsampling_rate=2,
        local_transformer_stride=4,
        num_hash_buckets=20,
        num_hash_functions=2,
    )
    case = bert_like(hf.CanineModel(config), kernel="softmax")
    case.blocks = {
        "encoder": ["initial_char_encoder.layer.0"],
        "encoder.1": ["encoder.layer.0", "encoder.layer.1"],
        "encoder.2": ["final_char_encoder.layer.0"],
    }
    case.heads = dict.fromkeys(case.blocks, 4)
    case.projections = {}
    return case


@family
def eurobert() -> Case:
    """Bidirectional with grouped queries and rotary positions."""
    return text(hf.EuroBertModel(hf.EuroBertConfig(**KV)), "layers", "self_attn.o_proj", name="encoder", cache=False)


@family
def nomic_bert() -> Case:
    """Rotary, gated MLP, post-norm."""
    model = hf.NomicBertModel(hf.NomicBertConfig(**TEXT))
    return text(model, "layers", "self_attn.o_proj", name="encoder", cache=False, with_read=False)


@refused("encoder.layers are run by their forward method and never called")
def squeezebert() -> Case:
    """Convolutions in place of projections, channels before tokens in the stream."""
    groups = {f"{name}_groups": 1 for name in ("q", "k", "v", "post_attention", "intermediate", "output")}
    return bert_like(hf.SqueezeBertModel(hf.SqueezeBertConfig(**TEXT, embedding_size=32, **groups)))


@refused("attentions attend, but do not hand a stream on to each other")
def xlm() -> Case:
    """Attention, norms and MLPs in lists side by side, post-norm."""
    return text(
        hf.XLMModel(hf.XLMConfig(n_words=50, emb_dim=32, n_layers=2, n_heads=4)),
        "attentions",
        "out_lin",
        name="encoder",
    )


@family
def big_bird_sparse() -> Case:
    """Windows of blocks, random blocks and global ones."""
    config = hf.BigBirdConfig(**PLAIN, attention_type="block_sparse", block_size=2, num_random_blocks=1, sep_token_id=2)
    case = unread(bert_like(hf.BigBirdModel(config), with_mid=[1, 2]), "is put together from several softmaxes")
    case.batch = {"input_ids": ids(2, 24), "attention_mask": torch.ones(2, 24, dtype=torch.int64)}
    return case
