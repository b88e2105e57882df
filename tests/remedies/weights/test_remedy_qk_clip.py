"""QK-clip: which weights are scaled, by how much, and what the scores then are."""

import kinds
import pytest
import torch
import transformers as hf
from attending import MASKS, repaired_and_seen
from remedy_patients import build

import fullrank
from fullrank.errors import RemedyError
from fullrank.remedies import Patient
from fullrank.remedies.weights.qk_clip import largest_scores

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")


def _largest(case):
    patient = Patient(case.model, lambda: case.model(**case.batch))
    return largest_scores(patient), [site.path for site in patient.self_attention]


@pytest.mark.parametrize("name", ["gpt2", "llama_padded", "bert", "t5", "vit", "torch_encoder", "zoo_decoder"])
def test_no_score_of_the_batch_exceeds_the_bound_and_the_first_layer_is_scaled_by_head(name):
    case = build(name)
    found, paths = _largest(case)
    bound = 0.4 * float(found[paths[0]].max())
    with fullrank.repair(case.model, "qk-clip", threshold=bound, batch=case.batch):
        clipped, _ = _largest(case)
        for path in paths:
            assert float(clipped[path].max()) <= 1.02 * bound
        expected = torch.where(found[paths[0]] > bound, bound, found[paths[0]])
        torch.testing.assert_close(clipped[paths[0]], expected, rtol=1e-9, atol=1e-12)
    for path, top in _largest(case)[0].items():
        assert torch.equal(top, found[path])


@pytest.mark.parametrize("mask", ["causal", "causal window", "padded", "biased"])
def test_the_largest_scores_are_those_of_the_dense_map(mask):
    case = MASKS[mask]()
    found, paths = _largest(case)
    with repaired_and_seen(case, "temperature", stirred=False) as (_, calls):
        for path, call in zip(paths, [c for c in calls() if c.part == "self"], strict=True):
            product = (call.scale * call.q @ call.k.mT).masked_fill(~call.visible, float("-inf"))
            torch.testing.assert_close(found[path], product.amax((0, 2, 3)), rtol=1e-12, atol=0)


def test_each_factor_is_the_root_where_no_key_head_is_shared():
    """GPT-2: rows of one matrix for queries, keys and values, and their biases."""
    kind = kinds.build("gpt2")
    attention = kind.model.h[0].attn.c_attn
    before = attention.weight.detach().clone(), attention.bias.detach().clone()
    found, paths = _largest(kind)
    S = found[paths[0]]
    bound = float(S.median()) * 0.9
    gamma = torch.where(bound < S, bound / S, 1.0)
    by_row = torch.cat([gamma.sqrt().repeat_interleave(8)] * 2 + [torch.ones(32).double()])
    with fullrank.repair(kind.model, "qk-clip", threshold=bound, batch=kind.batch):
        torch.testing.assert_close(attention.weight.detach(), before[0] * by_row, rtol=1e-12, atol=0)
        torch.testing.assert_close(attention.bias.detach(), before[1] * by_row, rtol=1e-12, atol=0)
    assert torch.equal(attention.weight, before[0])
    assert torch.equal(attention.bias, before[1])


def test_a_shared_key_head_takes_what_all_its_queries_need_and_each_query_head_the_rest():
    """Llama, two query heads to a key head, of which one alone is to be clipped: then the keys stay."""
    case = build("llama_padded")
    attention = case.model.layers[0].self_attn
    with torch.no_grad():
        attention.q_proj.weight[:8] *= 20
    key, query = attention.k_proj.weight.detach().clone(), attention.q_proj.weight.detach().clone()
    found, paths = _largest(case)
    S = found[paths[0]]
    others = float(S[1:].max())
    assert float(S[0]) > 3 * others
    with fullrank.repair(case.model, "qk-clip", threshold=2 * others, batch=case.batch):
        assert torch.equal(attention.k_proj.weight, key)
        torch.testing.assert_close(attention.q_proj.weight[:8], query[:8] * 2 * others / S[0], rtol=1e-12, atol=0)
        assert torch.equal(attention.q_proj.weight[8:], query[8:])


def test_nothing_is_written_where_nothing_exceeds_the_bound():
    case = build("gpt2")
    with torch.no_grad():
        before = case()
        with fullrank.repair(case.model, "qk-clip", batch=case.batch) as repair:
            assert torch.equal(case(), before)
            assert "no head: the largest score is" in str(repair)
            assert "changes nothing" in str(repair)


def test_for_scores_that_exploded_entropy_returns():
    """One head's queries and keys grown fourteenfold: its rows are one-hot, and after clipping to 4 they are not."""
    case = build("gpt2")
    with torch.no_grad():
        case.model.h[0].attn.c_attn.weight[:, :8] *= 14
        case.model.h[0].attn.c_attn.weight[:, 32:40] *= 14

    def entropy(remedy, **parameters):
        with repaired_and_seen(case, remedy, stirred=False, **parameters) as (_, calls):
            A = calls()[0].A[:, 0, 1:]
            return float(-torch.special.xlogy(A, A).sum(-1).mean())

    assert entropy("qk-clip", threshold=1e6) < 0.3
    assert entropy("qk-clip", threshold=4.0) > 0.5


def test_scores_behind_a_norm_are_refused_and_the_weights_are_as_before():
    config = hf.Qwen3Config(**kinds.TEXT, num_key_value_heads=2, head_dim=8)
    model = hf.Qwen3Model(config).double().eval()
    batch = {"input_ids": kinds.ids(), "use_cache": False}
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with pytest.raises(RemedyError, match="do not follow its weights"):
        fullrank.repair(model, "qk-clip", threshold=0.1, batch=batch)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
