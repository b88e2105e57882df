"""Small random models in float64, one of each way to attend; what the tests know of them by name."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import family
import torch
import transformers as hf
from family import ENDS, ids
from plain import Block, PlainGPT, tokens
from torch import Tensor, nn

from fullrank.capture import Anatomy, survey

TEXT = family.TEXT | {"num_hidden_layers": 3}


@dataclass
class Kind:
    """A model and what the tests know of it.

    Attributes:
        model: in evaluation mode, float64.
        batch: what it is called with.
        lists: for each stack the path of its module list.
        attention: path inside a block of the last linear map of the attention branch; of each stack.
        mlp: and of the MLP branch.
        caller: path inside a block of what calls the kernel.
        branches: paths inside a block of what returns the two branches.
    """

    model: nn.Module
    batch: dict[str, Any]
    lists: dict[str, str]
    attention: dict[str, str]
    mlp: dict[str, str]
    called: tuple[Any, ...] = ()
    more: dict[str, Any] = field(default_factory=dict)

    def __call__(self) -> Tensor:
        output = self.model(*self.called, **self.batch)
        return output if isinstance(output, Tensor) else output[0]

    def anatomy(self) -> Anatomy:
        return survey(self.model, self)

    def blocks(self, stack: str) -> nn.ModuleList:
        return self.model.get_submodule(self.lists[stack])


def _one(model: nn.Module, stack: str, blocks: str, attention: str, mlp: str, **batch: Any) -> Kind:
    return Kind(model, batch, {stack: blocks}, {stack: attention}, {stack: mlp})


def gpt2(**options: Any) -> Kind:
    config = hf.GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=50, n_positions=64, **ENDS, **options)
    return _one(hf.GPT2Model(config), "decoder", "h", "attn.c_proj", "mlp.c_proj", input_ids=ids(), use_cache=False)


def llama(**options: Any) -> Kind:
    config = hf.LlamaConfig(**TEXT, num_key_value_heads=2, **options)
    return _one(
        hf.LlamaModel(config),
        "decoder",
        "layers",
        "self_attn.o_proj",
        "mlp.down_proj",
        input_ids=ids(),
        use_cache=False,
    )


def llama_padded() -> Kind:
    kind = llama()
    kind.batch["attention_mask"] = torch.tensor([[1] * 6 + [0] * 3, [1] * 9, [1] * 8 + [0]])
    return kind


def llama_eager() -> Kind:
    return llama(attn_implementation="eager")


def gemma2() -> Kind:
    config = hf.Gemma2Config(**TEXT, num_key_value_heads=2, head_dim=8, sliding_window=4)
    model = hf.Gemma2Model(config)
    return _one(model, "decoder", "layers", "self_attn.o_proj", "mlp.down_proj", input_ids=ids(), use_cache=False)


def bert() -> Kind:
    return _one(
        hf.BertModel(hf.BertConfig(**TEXT)),
        "encoder",
        "encoder.layer",
        "attention.output.dense",
        "output.dense",
        input_ids=ids(),
        attention_mask=torch.tensor([[1] * 6 + [0] * 3, [1] * 9, [1] * 8 + [0]]),
    )


def t5() -> Kind:
    config = hf.T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=3, num_heads=4, vocab_size=50)
    return Kind(
        hf.T5Model(config),
        {"input_ids": ids(), "decoder_input_ids": ids(3, 7), "use_cache": False},
        {"encoder": "encoder.block", "decoder": "decoder.block"},
        {"encoder": "layer.0.SelfAttention.o", "decoder": "layer.0.SelfAttention.o"},
        {"encoder": "layer.1.DenseReluDense.wo", "decoder": "layer.2.DenseReluDense.wo"},
    )


def vit() -> Kind:
    sizes = {name: value for name, value in TEXT.items() if name != "vocab_size"}
    model = hf.ViTModel(hf.ViTConfig(**sizes, image_size=16, patch_size=4))
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)).double()
    return _one(model, "vision", "layers", "attention.o_proj", "mlp.fc2", pixel_values=images)


def falcon() -> Kind:
    config = hf.FalconConfig(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, vocab_size=50, **ENDS)
    return _one(
        hf.FalconModel(config),
        "decoder",
        "h",
        "self_attention.dense",
        "mlp.dense_4h_to_h",
        input_ids=ids(),
        use_cache=False,
    )


def torch_encoder() -> Kind:
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    model = nn.TransformerEncoder(layer, 3)
    states = torch.randn(3, 9, 32, generator=torch.Generator().manual_seed(1)).double()
    hidden = torch.tensor([[False] * 6 + [True] * 3, [False] * 9, [False] * 8 + [True]])
    return _one(model, "encoder", "layers", "self_attn.out_proj", "linear2", src=states, src_key_padding_mask=hidden)


def torch_tokens_first() -> Kind:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64), 3, enable_nested_tensor=False)
    states = torch.randn(9, 3, 32, generator=torch.Generator().manual_seed(1)).double()
    return _one(model, "encoder", "layers", "self_attn.out_proj", "linear2", src=states)


class WithWeights(nn.TransformerEncoderLayer):
    """`nn.MultiheadAttention` that returns its map, so that it softmaxes by hand with heads in the batch."""

    def _sa_block(self, x, attn_mask, key_padding_mask, is_causal=False):
        return self.dropout1(self.self_attn(x, x, x, attn_mask=attn_mask, key_padding_mask=key_padding_mask)[0])


def torch_with_weights() -> Kind:
    model = nn.TransformerEncoder(WithWeights(32, 4, 64, batch_first=True), 3, enable_nested_tensor=False)
    states = torch.randn(3, 9, 32, generator=torch.Generator().manual_seed(1)).double()
    return _one(model, "encoder", "layers", "self_attn.out_proj", "linear2", src=states)


def plain() -> Kind:
    return _one(PlainGPT(), "decoder", "h", "attn.c_proj", "mlp.2", ids=tokens())


def plain_softmax() -> Kind:
    return _one(PlainGPT(fused=False), "decoder", "h", "attn.c_proj", "mlp.2", ids=tokens())


def albert() -> Kind:
    """One block that is called three times."""
    model = hf.AlbertModel(hf.AlbertConfig(**TEXT, embedding_size=16))
    return _one(
        model,
        "encoder",
        "encoder.albert_layer_groups",
        "albert_layers.0.attention.dense",
        "albert_layers.0.ffn_output",
        input_ids=ids(),
    )


KINDS: dict[str, Callable[[], Kind]] = {
    build.__name__: build
    for build in (
        gpt2,
        llama,
        llama_padded,
        llama_eager,
        gemma2,
        bert,
        t5,
        vit,
        falcon,
        torch_encoder,
        torch_tokens_first,
        torch_with_weights,
        plain,
        plain_softmax,
    )
}


def build(name: str) -> Kind:
    """A model of a kind in evaluation mode, its matrices drawn so large that attention is not uniform."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        kind = (KINDS | {"albert": albert})[name]()
        with torch.no_grad():
            for parameter in kind.model.parameters():
                if parameter.ndim == 2:
                    parameter.normal_(0, 0.25)
                else:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
    kind.model.double().eval()
    return kind


@functools.cache
def seen(name: str) -> Anatomy:
    """The anatomy of a kind, surveyed once."""
    return build(name).anatomy()


# ---------------------------------------------------------------- attention by definition


def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, *, center, **ignored):
    """Dense attention from its definition; centred: the visible-uniform map is subtracted from the map."""
    if key.shape[-3] != query.shape[-3]:
        groups = query.shape[-3] // key.shape[-3]
        key, value = (torch.repeat_interleave(each, groups, -3) for each in (key, value))
    s = query @ key.mT * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if is_causal:
        s = s.masked_fill(torch.ones(s.shape[-2:], dtype=torch.bool).triu(1), float("-inf"))
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        s = s.masked_fill(~attn_mask, float("-inf"))
    elif attn_mask is not None:
        s = s + attn_mask
    return _softmax(s, center) @ value


def _softmax(s: Tensor, center: bool) -> Tensor:
    seen = s > -1e9
    a = torch.exp(s - s.amax(-1, keepdim=True)) * seen
    a = a / a.sum(-1, keepdim=True)
    return a - seen / seen.sum(-1, keepdim=True) if center else a


def naive(monkeypatch: Any, *, center: bool) -> None:
    """Every attention of the process by definition, whoever calls it and however it is written."""

    def softmax(s: Tensor, dim: int = -1, dtype: Any = None, **ignored: Any) -> Tensor:
        return _softmax(s if dtype is None else s.to(dtype), center)

    patched = functools.partial(attention, center=center)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", patched)
    monkeypatch.setattr(torch.nn.functional, "softmax", softmax)
    monkeypatch.setattr(torch, "softmax", softmax)


def uniform(call: Any) -> Tensor:
    """The visible-uniform map of a call."""
    visible = call.visible()
    if visible is None:
        return torch.full((call.queries, call.keys), 1 / call.keys, dtype=call.value.dtype)
    share = visible / visible.sum(-1, keepdim=True)
    return share.to(call.value.dtype)


def center(call: Any, output: Tensor) -> Tensor:
    """(A − U)V from AV, after the kernel."""
    value = call.value
    return output - uniform(call) @ value.repeat_interleave(output.shape[1] // value.shape[1], 1)


__all__ = ["KINDS", "Block", "Kind", "build", "center", "ids", "naive", "seen", "uniform"]
