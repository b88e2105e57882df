"""A local mask against its definition, and the collapse that it slows."""

import pytest
import torch
import transformers as hf
from attending import MASKS, dense_softmax, real_rows, repaired_and_seen, tolerance
from calls import normal, shown
from torch.nn import functional

import fullrank
from fullrank.errors import EditError
from fullrank.remedies.attention.local_mask import LocalMask
from fullrank.remedies.attention.own_windows import shown_at_most


def _near(T, window, side, starts, first):
    """(batch, 1, T, T); `starts` are the columns of the first real tokens."""
    return torch.tensor(
        [
            [
                [(abs(t - s) < window or start <= s < start + first) and (side == "both" or s <= t) for s in range(T)]
                for t in range(T)
            ]
            for start in starts
        ]
    )[:, None]


@pytest.mark.parametrize(("window", "side", "first"), [(None, "both", 0), (2, "past", 1), (1, "both", 2)])
@pytest.mark.parametrize("mask", MASKS)
def test_what_is_far_is_hidden_beside_what_is_hidden(mask, window, side, first):
    case = MASKS[mask]()
    parameters = {"window": window, "side": side, "first": first}
    with repaired_and_seen(case, "local-mask", **parameters) as (_, calls):
        for call in [call for call in calls() if call.part == "self"]:
            T = call.s.shape[-1]
            padding = case.batch.get("attention_mask")
            starts = [0] * len(call.s) if padding is None else padding.argmax(1).tolist()
            near = _near(T, T // 2 if window is None else window, side, starts, first)
            s = call.s.masked_fill(~near, float("-inf"))
            rows = real_rows(case, call) & (call.visible & near).any(-1)
            assert rows.any()
            torch.testing.assert_close(
                call.output[rows], (dense_softmax(s) @ call.v)[rows], rtol=0, atol=tolerance(mask)
            )


def test_for_uniform_attention_tokens_collapse_more_slowly_the_narrower_the_window():
    """X ← AX without skips, 8 layers: what is left of the tokens' differences, as a share."""
    left = {}
    for window in (2, 4, 64):
        mask, X = LocalMask(window, 0, past=False), normal(1, 1, 64, 32)
        for _ in range(8):
            call = mask(shown(torch.zeros_like(X), torch.zeros_like(X), X))
            X = functional.scaled_dot_product_attention(call.query, call.key, call.value, call.mask)
        left[window] = float((X - X.mean(-2, keepdim=True)).norm() / X.norm())
    assert left[2] > left[4] > 0.5
    assert left[64] < 1e-12


def test_with_fewer_queries_than_keys_the_queries_are_the_last():
    near = LocalMask(2, 0, past=True).near(shown(normal(1, 1, 1, 4), normal(1, 1, 5, 4)))
    assert near.tolist() == [[[[False, False, False, True, True]]]]


def test_places_of_a_cache_that_are_still_empty_are_not_near_anything():
    sees = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0]], dtype=torch.bool)[None, None]
    call = shown(normal(1, 1, 2, 4), normal(1, 1, 6, 4), mask=sees)
    found = LocalMask(2, 0, past=False)(call).mask
    assert found.int().tolist() == [[[[0, 1, 1, 0, 0, 0], [0, 0, 1, 1, 0, 0]]]]


def test_the_first_are_the_first_tokens_and_no_padding():
    real = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]], dtype=torch.bool)
    sees = real[:, None, None] & torch.ones(6, 6, dtype=torch.bool).tril()
    found = LocalMask(1, 1, past=False)(shown(normal(2, 1, 6, 4), normal(2, 1, 6, 4), mask=sees)).mask[:, 0]
    assert found[0, 2:].int().tolist() == [
        [0, 0, 1, 0, 0, 0],
        [0, 0, 1, 1, 0, 0],
        [0, 0, 1, 0, 1, 0],
        [0, 0, 1, 0, 0, 1],
    ]
    assert found[1, 4].int().tolist() == [1, 0, 0, 0, 1, 0]


TEXT = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
TEXT |= {"num_key_value_heads": 2, "initializer_range": 0.5, "max_position_embeddings": 32}
IDS = torch.randint(1, 50, (2, 12), generator=torch.Generator().manual_seed(0))


def _decoder(kind, attention):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        given = {**TEXT, "attn_implementation": attention}
        if kind == "llama":
            model = hf.LlamaForCausalLM(hf.LlamaConfig(**given))
        elif kind == "mistral":
            model = hf.MistralForCausalLM(hf.MistralConfig(**given, sliding_window=5))
        else:
            layers = ["sliding_attention", "full_attention"]
            config = hf.Gemma3TextConfig(**given, sliding_window=5, head_dim=4, layer_types=layers)
            model = hf.Gemma3ForCausalLM(config)
    return model.double().eval()


def _cache(kind, model):
    return {
        "dynamic": lambda: hf.DynamicCache(config=model.config),
        "uncut": hf.DynamicCache,
        "static": lambda: hf.StaticCache(config=model.config, max_cache_len=16),
    }[kind]()


def _by_token(model, cache):
    """The first six tokens at once, then one by one."""
    pieces = [(0, 6), *((t, t + 1) for t in range(6, 12))]
    return torch.cat([model(IDS[:, a:b], past_key_values=cache, use_cache=True).logits for a, b in pieces], 1)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("cache", ["dynamic", "uncut", "static"])
@pytest.mark.parametrize(("kind", "first"), [("llama", 0), ("llama", 2), ("mistral", 0), ("gemma3", 0)])
def test_beside_every_kind_of_cache_it_is_what_it_is_without(kind, first, cache, attention):
    model = _decoder(kind, attention)
    with torch.no_grad():
        base = model(IDS, use_cache=False).logits
        with fullrank.repair(model, "local-mask", window=3, first=first, batch={"input_ids": IDS}):
            whole = model(IDS, use_cache=False).logits
            found = _by_token(model, _cache(cache, model))
    close = 1e-9 if attention == "sdpa" else 1e-4  # its softmax is in float32
    torch.testing.assert_close(found, whole, rtol=0, atol=close)
    assert not torch.allclose(whole, base, atol=1e-1)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("cache", ["dynamic", "uncut", "static"])
@pytest.mark.parametrize("kind", ["mistral", "gemma3"])
@pytest.mark.parametrize("length", [12, 4])
def test_with_a_window_of_the_model_the_first_are_refused_beside_a_cache(kind, cache, attention, length):
    """Also where the batch of the repair is shorter than the window, and padded."""
    model = _decoder(kind, attention)
    real = torch.ones_like(IDS[:, :length])
    real[0, 0] = 0
    batch = {"input_ids": IDS[:, :length], "attention_mask": real}
    with fullrank.repair(model, "local-mask", window=3, first=1, batch=batch), torch.no_grad():
        model(IDS, use_cache=False)
        with pytest.raises(EditError, match="with a window of 5 of its own"):
            _by_token(model, _cache(cache, model))


def test_what_a_window_shows_is_read_from_who_sees_whom():
    causal = torch.ones(7, 7, dtype=torch.bool).tril()
    window = causal.triu(-2)
    padded = causal.clone()
    padded[:, :2] = False
    everything = padded.clone()
    everything[:2] = True  # what some models make of rows that would see nothing
    both = torch.ones(7, 7, dtype=torch.bool).tril(2).triu(-2)
    packed = torch.block_diag(torch.ones(3, 3), torch.ones(4, 4)).tril().bool()
    cases = ((causal, None), (window, 3), (padded, None), (everything, None), (both, None), (packed, 4))
    for seen, number in cases:
        assert shown_at_most(seen[None, None]) == number
