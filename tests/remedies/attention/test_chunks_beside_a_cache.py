"""Text read in pieces beside a cache by a kernel that counts from the last query and key, against the whole text."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from torch.nn import functional
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import fullrank
from fullrank.edit.packed import from_the_end

TEXT = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
TEXT |= {"num_key_value_heads": 2, "initializer_range": 0.5, "max_position_embeddings": 32}
IDS = torch.randint(1, 50, (2, 12), generator=torch.Generator().manual_seed(0))
PIECES = ((0, 5), (5, 9), (9, 10), (10, 12))


def _flash(module, query, key, value, attention_mask, scaling=None, sliding_window=None, **ignored):
    """What flash attention computes, from a mask told by loops."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    T, S = query.shape[2], key.shape[2]
    w = S if sliding_window is None else sliding_window
    seen = torch.tensor([[t + S - T - w < s <= t + S - T for s in range(S)] for t in range(T)])[None, None]
    if attention_mask is not None:
        seen = seen & attention_mask[:, None, None, -S:].bool()
    output = functional.scaled_dot_product_attention(query, key, value, seen, scale=scaling)
    return output.transpose(1, 2).contiguous(), None


@pytest.fixture(params=["llama", "mistral"])
def model(request, monkeypatch):
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "flash_attention_2", _flash)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if request.param == "llama":
            model = hf.LlamaForCausalLM(hf.LlamaConfig(**TEXT))
        else:
            model = hf.MistralForCausalLM(hf.MistralConfig(**TEXT, sliding_window=4))
    model.config._attn_implementation = "flash_attention_2"
    return model.double().eval()


@pytest.mark.parametrize(
    "remedy",
    [
        "differential",
        "differential?start=.5",
        "temperature?kind=log-context&scale=.7",
        "center-attention",
        "shaped?start=skipless",
    ],
)
@pytest.mark.parametrize("padding", [0, 3])
def test_pieces_give_what_the_whole_text_gives(model, remedy, padding):
    real = torch.ones_like(IDS)
    real[0, :padding] = 0
    place = (real.cumsum(1) - 1).clamp(min=0)
    told = {} if padding == 0 else {"attention_mask": real}

    def read(first, stop, cache):
        more = {} if padding == 0 else {"attention_mask": real[:, :stop], "position_ids": place[:, first:stop]}
        return model(IDS[:, first:stop], past_key_values=cache, use_cache=cache is not None, **more).logits

    with torch.no_grad():
        base = read(0, 12, None)
        with fullrank.repair(model, remedy, batch={"input_ids": IDS, **told}):
            whole, cache = read(0, 12, None), hf.DynamicCache()  # keeps all keys, beside a window too
            pieces = torch.cat([read(*piece, cache) for piece in PIECES], 1)
    seen = real.bool()
    torch.testing.assert_close(pieces[seen], whole[seen], rtol=0, atol=1e-9)
    assert torch.allclose(whole[seen], base[seen], atol=1e-6) == (remedy == "differential")


@pytest.mark.parametrize("window", [None, 3, 9])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("T", "S"), [(5, 5), (3, 7), (1, 7)])
def test_who_sees_whom_is_counted_from_the_last_of_both(T, S, causal, window):
    given = {"query": torch.zeros(2, 1, T, 1), "key": torch.zeros(2, 1, S, 1)}
    real = torch.ones(2, 1, 1, S, dtype=torch.bool)
    real[0, ..., 0] = False
    expected = torch.zeros(2, T, S, dtype=torch.bool)
    for b in range(2):
        for t in range(T):
            for s in range(S):
                apart = t + S - T - s
                near = window is None or window >= S or abs(apart) < window
                expected[b, t, s] = bool(real[b, 0, 0, s]) and (not causal or apart >= 0) and near
    found = from_the_end("flash_attention_2", given, causal=causal, window=window, real=real)
    if found is None:  # said by the flag and the window as they are
        assert (T == S and causal) or (not causal and window in (None, 9))
    else:
        assert torch.equal(found.mask()[:, 0], expected)
    assert from_the_end("sdpa", given, causal=causal, window=window, real=real) is None
