"""The size of W_Q and W_K: scores as wide as the law says on every mask, by which weights, and what it is for."""

import math

import kinds
import pytest
import torch
import transformers as hf
from attending import MASKS, repaired_and_seen
from kinds import ids
from matrices import matrices, others
from remedy_patients import Case

import fullrank
from fullrank.errors import RemedyError
from fullrank.zoo import Transformer, TransformerConfig

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")


def gauges(call, context=None):
    """Mean over queries of std_s(a_ts)/√log n_t by definition, one query after the other; biases left out."""
    found = []
    for head in range(call.visible.shape[1]):
        rows = []
        for b in range(call.visible.shape[0]):
            for t in range(call.visible.shape[2]):
                seen = call.visible[b, head, t]
                if int(seen.sum()) < 2:
                    continue
                a = (
                    call.s[b, head, t][seen]
                    if call.q is None
                    else call.scale * call.k[b, head][seen] @ call.q[b, head, t]
                )
                rows.append(float(a.std(correction=0)) / math.log(context or int(seen.sum())) ** 0.5)
        found.append(sum(rows) / len(rows))
    return found


@pytest.mark.parametrize("mask", MASKS)
def test_scores_of_every_head_are_as_wide_as_asked(mask):
    case = MASKS[mask]()
    with repaired_and_seen(case, "qk-scale-init", b=0.8) as (repair, calls):
        seen = [call for call in calls() if call.part == "self"]
        assert repair.parameters == 0
    assert seen
    for call in seen:
        assert gauges(call) == pytest.approx([0.8] * call.s.shape[1], rel=2e-6)


def test_a_context_takes_the_place_of_the_visible_keys():
    case = MASKS["causal"]()
    with repaired_and_seen(case, "qk-scale-init", context=100_000) as (_, calls):
        for call in calls():
            assert gauges(call, 100_000) == pytest.approx([1.0] * 4, rel=2e-6)


def test_by_the_logarithm_cosines_are_multiplied_by_gamma_log_n():
    case = MASKS["causal and padded"]()
    with repaired_and_seen(case, "qk-scale-init", b=1.5, law="log") as (_, calls):
        for call in calls():
            n = call.visible.sum(-1)
            sizes = call.scale * call.q.norm(dim=-1)[..., :, None] * call.k.norm(dim=-1)[..., None, :]
            rows = torch.where(call.visible, sizes, 0).sum(-1) / n / n.clamp(min=2).log()
            counted = n >= 2
            for head in range(4):
                assert float(rows[:, head][counted[:, head]].mean()) == pytest.approx(1.5, rel=2e-6)
    explicit = kinds.build("plain_softmax")
    with pytest.raises(RemedyError, match="does not show its queries and keys; use law=sqrt-log"):
        fullrank.repair(explicit.model, "qk-scale-init", law="log", batch=explicit.batch)


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5", "torch_encoder"])
def test_queries_and_keys_of_a_head_are_multiplied_by_one_number_and_nothing_else_changes(name):
    kind = kinds.build(name)
    before = matrices(name, kind.model)
    rest = others(kind.model, before)
    with fullrank.repair(kind.model, "qk-scale-init", batch=kind.batch):
        found = matrices(name, kind.model)
        assert all(torch.equal(p, rest[n]) for n, p in kind.model.named_parameters() if n in rest)
    for (stack, layer, role), W in found.items():
        old = before[stack, layer, role]
        if role not in ("q", "k"):
            assert torch.equal(W, old)
            continue
        for head, was in zip(W.split(8), old.split(8), strict=True):
            factor = (head * was).sum() / was.square().sum()
            torch.testing.assert_close(head, factor * was, rtol=1e-12, atol=0)
            assert factor != 1
    if name == "llama":  # a key head takes the square root of the mean factor of its two query heads
        for layer in (1, 2, 3):
            q, k = ((found["decoder", layer, r] / before["decoder", layer, r])[::8, 0] for r in "qk")
            torch.testing.assert_close(k[0] ** 2, q[0] * q[1], rtol=1e-9, atol=0)


def test_a_block_that_is_called_three_times_is_set_by_the_mean_of_its_calls():
    kind = kinds.build("albert")
    with repaired_and_seen(Case(kind.model, kind.batch, 3), "qk-scale-init") as (_, calls):
        found = torch.tensor([gauges(call) for call in calls()])
    torch.testing.assert_close(found.mean(0), torch.ones(4), rtol=2e-6, atol=0)


def test_normalised_queries_and_keys_are_refused():
    config = hf.Qwen3Config(**kinds.TEXT, num_key_value_heads=2, head_dim=8)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = hf.Qwen3Model(config).double().eval()
    state = {n: p.detach().clone() for n, p in model.named_parameters()}
    with pytest.raises(RemedyError, match="do not follow the size of W_Q and W_K: queries or keys are normalised"):
        fullrank.repair(model, "qk-scale-init", batch={"input_ids": ids(), "use_cache": False})
    assert all(torch.equal(p, state[n]) for n, p in model.named_parameters())


def test_attention_that_averages_selects_with_it_and_above_the_threshold_it_is_frozen():
    """Weights of GPT-2's size: maps are uniform; at b = 0.5 and 1 less and less, at 4 one key takes all."""
    config = TransformerConfig(
        depth=2, width=64, heads=2, vocabulary=256, context=256, positions="none", biases=False, weight_std=0.02
    )
    model = Transformer(config, seed=0).double().eval()
    batch = {"input_ids": torch.randperm(256, generator=torch.Generator().manual_seed(0))[None]}

    def entropy():
        rows = fullrank.examine(model, batch, spectrum=False).rows
        found = [row.value for row in rows if row.metric == "normalized_entropy" and row.scope == "all"]
        return sum(found) / len(found)

    found = [entropy()]
    for b in (0.5, 1.0, 4.0):
        with fullrank.repair(model, "qk-scale-init", b=b, batch=batch):
            found.append(entropy())
    assert found[0] > 0.999
    # random energy model: 1 − b²/2 up to √2, 0 above; with 256 keys above it is rounded off
    assert found[1] == pytest.approx(1 - 0.5**2 / 2, abs=0.05)
    assert found[2] == pytest.approx(1 - 1 / 2, abs=0.12)
    assert found[3] < 0.15
