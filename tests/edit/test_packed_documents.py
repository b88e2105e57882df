"""Documents in one row whose kernel is told their lengths: an edit sees who sees whom, or says that it cannot."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import transformers as hf
from kinds import TEXT, center
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface

from fullrank.capture import survey
from fullrank.edit import rewrite_attention
from fullrank.edit.packed import documents_of
from fullrank.errors import EditError

ENDS = torch.tensor([0, 4, 9])


def _varlen(module, query, key, value, attention_mask, scaling=None, cu_seq_lens_q=None, **ignored):
    """Who is in which document, from the lengths alone."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    seen = torch.block_diag(*(torch.ones(b - a, b - a) for a, b in pairwise(cu_seq_lens_q.tolist()))).tril().bool()
    output = functional.scaled_dot_product_attention(query, key, value, seen, scale=scaling)
    return output.transpose(1, 2).contiguous(), None


@pytest.fixture
def packed(monkeypatch):
    """A model, its packed forward, and the same documents each alone."""
    monkeypatch.setitem(AttentionInterface._global_mapping, "varlen", _varlen)
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, "varlen", lambda *given, **more: None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = hf.LlamaConfig(**TEXT, num_key_value_heads=2, attn_implementation="varlen", initializer_range=0.3)
        model = hf.LlamaModel(config).double().eval()
    ids = torch.randint(1, 50, (1, 9), generator=torch.Generator().manual_seed(1))

    def run(ends):
        place = torch.cat([torch.arange(b - a) for a, b in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True)])
        lengths = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 5, "max_length_k": 5}
        return lambda some=ids: model(some, position_ids=place[None], use_cache=False, **lengths)[0]

    def alone():
        return torch.cat([run(torch.tensor([0, b - a]))(ids[:, a:b]) for a, b in ((0, 4), (4, 9))], 1)

    return model, run(ENDS), alone


def test_a_centred_map_of_packed_documents_is_that_of_each_alone(packed):
    model, together, alone = packed
    with torch.no_grad():
        base = together()
        torch.testing.assert_close(base, alone(), rtol=0, atol=1e-10)
        with rewrite_attention(model, survey(model, together), after=center):
            found = together()
            torch.testing.assert_close(found, alone(), rtol=0, atol=1e-10)
    assert not torch.allclose(found, base, atol=1e-3)


def test_what_computes_in_the_place_of_a_packed_kernel_sees_its_documents(packed):
    model, together, _ = packed

    def attend(call):
        K, V = (x.repeat_interleave(call.query.shape[1] // x.shape[1], 1) for x in (call.key, call.value))
        return functional.scaled_dot_product_attention(call.query, K, V, call.additive(), scale=call.scale)

    with torch.no_grad():
        expected = together()
        with rewrite_attention(model, survey(model, together), before=lambda call: call.change(attend=attend)):
            torch.testing.assert_close(together(), expected, rtol=0, atol=1e-10)


def test_no_mask_is_made_for_edits_that_ask_for_none_and_changing_it_is_refused(packed):
    model, together, alone = packed
    calls = []

    def hot(call):
        calls.append(call.change(query=2 * call.query))
        return calls[-1]

    anatomy = survey(model, together)
    with torch.no_grad():
        with rewrite_attention(model, anatomy, before=hot):
            torch.testing.assert_close(together(), alone(), rtol=0, atol=1e-10)
        assert calls
        assert not any("_made" in call.__dict__ for call in calls)
        causal = rewrite_attention(model, anatomy, before=lambda call: call.change(causal=True))
        with causal, pytest.raises(EditError, match="takes none"):
            together()


@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("causal", [True, False])
def test_the_mask_of_lengths_is_that_of_each_document_aligned_at_its_end(causal, window):
    of_queries, of_keys = [0, 2, 5], [0, 3, 7]
    given = {"query": torch.zeros(1, 1, 5, 1), "key": torch.zeros(1, 1, 7, 1)}
    given |= {"cu_seq_lens_q": torch.tensor(of_queries), "cu_seq_lens_k": torch.tensor(of_keys)}
    found = documents_of("flash_attention_2", given, causal=causal, window=window).mask()
    expected = torch.zeros(5, 7, dtype=torch.bool)
    for a, b, c, d in zip(of_queries, of_queries[1:], of_keys, of_keys[1:], strict=False):
        for t in range(a, b):
            for s in range(c, d):
                apart = (t - b) - (s - d)
                expected[t, s] = (not causal or apart >= 0) and (window is None or abs(apart) < window)
    assert torch.equal(found[0, 0], expected)


def test_positions_that_start_again_are_documents_where_the_kernel_reads_them_so():
    given = {"query": torch.zeros(1, 1, 5, 1), "key": torch.zeros(1, 1, 5, 1)}
    given["position_ids"] = torch.tensor([[0, 1, 2, 0, 1]])
    found = documents_of("flash_attention_2", given, causal=True, window=None).mask()[0, 0]
    expected = torch.block_diag(torch.ones(3, 3), torch.ones(2, 2)).tril().bool()
    assert torch.equal(found, expected)
    assert documents_of("sdpa", given, causal=True, window=None) is None
    given["position_ids"] = torch.arange(3, 8)[None]
    assert documents_of("flash_attention_2", given, causal=True, window=None) is None
