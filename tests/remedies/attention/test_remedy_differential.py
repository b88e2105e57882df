"""The difference of two maps against its definition on dense ones."""

import pytest
import torch
import transformers as hf
from attending import MASKS, dense_softmax, real_rows, repaired_and_seen, tolerance
from attention_only import AttentionOnly

import fullrank
from fullrank.capture import survey
from fullrank.errors import EditError, RemedyError
from fullrank.remedies.attention.differential import lambda_at_first
from golden import assert_golden


def second_map(call, tau):
    """The queries times τ; where they are not seen, the scores."""
    if call.q is None:
        return dense_softmax(torch.where(call.visible, tau[:, None] * call.s.masked_fill(~call.visible, 0), call.s))
    return dense_softmax(call.s + call.scale * (call.q * (tau - 1)[:, None]) @ call.k.mT)


@pytest.mark.parametrize("mask", MASKS)
def test_a_share_of_a_second_map_is_subtracted(mask):
    case = MASKS[mask]()
    with repaired_and_seen(case, "differential") as (_, calls):
        modules = [m for n, m in case.model.named_modules() if n.endswith("fullrank_differential_after")]
        seen = [call for call in calls() if call.part == "self"]
        assert len(seen) == len(modules)
        for call, module in zip(seen, modules, strict=True):
            first = lambda_at_first(call.layer - 1)
            share = (first + module.delta.detach())[:, None, None]
            tau = module.tau.detach()[:, None]
            expected = (call.A - share * second_map(call, tau)) @ call.v / (1 - first)
            rows = real_rows(case, call)
            torch.testing.assert_close(call.output[rows], expected[rows], rtol=0, atol=tolerance(mask))


@pytest.mark.parametrize("mask", ["causal", "padded", "biased"])
def test_features_of_the_queries_may_have_factors_of_their_own_and_heads_be_normalised(mask):
    case = MASKS[mask]()
    with repaired_and_seen(case, "differential?second=features&norm=head&strength=0.4") as (_, calls):
        modules = [m for n, m in case.model.named_modules() if n.endswith("fullrank_differential_after")]
        seen = [call for call in calls() if call.part == "self"]
        for call, module in zip(seen, modules, strict=True):
            share = (0.4 + module.delta.detach())[:, None, None]
            Y = (call.A - share * second_map(call, module.tau.detach())) @ call.v
            expected = 0.6 * module.gain.detach() * Y / (Y.square().mean(-1, keepdim=True) + 1e-5).sqrt()
            rows = real_rows(case, call)
            torch.testing.assert_close(call.output[rows], expected[rows], rtol=0, atol=1e-9)


def test_the_share_grows_with_depth():
    assert_golden("of-diff-lambda-init", [lambda_at_first(layer) for layer in range(4)])


def test_at_temperature_zero_it_is_a_gain_for_what_attention_adds_to_the_mean():
    """(A − λU)/(1 − λ) = U + (A − U)/(1 − λ): AttnScale with ω = λ/(1 − λ)."""
    model = AttentionOnly(tokens=24, width=32, heads=4, layers=4, seed=0)
    with fullrank.repair(model, "attn-scale?start=4", batch={"X": model.start}):
        expected = model.states()
    with fullrank.repair(model, "differential?start=0&strength=0.8", batch={"X": model.start}):
        for found, X in zip(model.states(), expected, strict=True):
            torch.testing.assert_close(found, X)


def test_it_composes_with_another_edit_of_the_same_calls():
    model = AttentionOnly(tokens=24, width=32, heads=4, layers=2, seed=0)
    with torch.no_grad():
        for remedies in (["differential", "attn-scale"], ["attn-scale", "differential"]):
            before = model(model.start)
            with fullrank.repair(model, remedies, batch={"X": model.start}):
                torch.testing.assert_close(model(model.start), before)


def test_measuring_sees_one_map_per_head():
    model = AttentionOnly(tokens=24, width=32, heads=4, layers=2, seed=0)
    with fullrank.repair(model, "differential", batch={"X": model.start}):
        seen = fullrank.examine(model, {"X": model.start}, spectrum=False, reference=False)
    parts = {row.part for row in seen.rows.where(metric="entropy").rows}
    assert len(parts) == 1


def test_without_queries_there_are_no_features_to_scale():
    case = MASKS["causal, explicit softmax"]()
    with pytest.raises(RemedyError, match="softmaxes by itself and shows none; use second=temperature"):
        fullrank.repair(case.model, "differential?second=features", batch=case.batch)


TEXT = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 32}
TEXT |= {"num_key_value_heads": 2, "initializer_range": 0.5, "max_position_embeddings": 32}
IDS = torch.randint(1, 50, (2, 9), generator=torch.Generator().manual_seed(0))


def _made(kind, config, dtype=torch.float64, **options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind(config(**options)).to(dtype).eval()


def test_a_sink_of_the_model_is_refused_where_it_softmaxes_by_itself():
    """Rows are shifted by their largest score before, so that what τ makes of scores beside the sink is not known."""
    options = {**TEXT, "head_dim": 4, "sliding_window": 64, "layer_types": ["full_attention"]}
    options |= {"num_local_experts": 2, "num_experts_per_tok": 1, "attn_implementation": "eager"}
    model = _made(hf.GptOssModel, hf.GptOssConfig, torch.float32, **options)
    with torch.no_grad():
        before = model(IDS, use_cache=False)[0]
        with pytest.raises((EditError, RemedyError), match="put in or with a sink"):
            fullrank.repair(model, "differential", batch={"input_ids": IDS, "use_cache": False})
        assert torch.equal(model(IDS, use_cache=False)[0], before)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("order", [1, -1])
def test_beside_a_map_that_another_remedy_puts_in_it_is_refused_whatever_the_kernel(attention, order):
    model = _made(hf.LlamaModel, hf.LlamaConfig, **TEXT, attn_implementation=attention)
    with pytest.raises((EditError, RemedyError), match="differential"):
        fullrank.repair(model, ["differential", "softpick"][::order], batch={"input_ids": IDS})


@pytest.mark.parametrize("other", ["center-attention", "attn-scale?start=0.5", "shaped?start=skipless"])
@pytest.mark.parametrize("order", [1, -1])
def test_beside_what_acts_behind_the_kernel_it_is_the_same_whatever_the_kernel(other, order):
    found = []
    for attention in ("sdpa", "eager"):
        model = _made(hf.LlamaModel, hf.LlamaConfig, torch.float32, **TEXT, attn_implementation=attention)
        with fullrank.repair(model, ["differential?start=0.5", other][::order], batch={"input_ids": IDS}):
            found.append(model(IDS, use_cache=False)[0].detach())
    torch.testing.assert_close(*found, rtol=0, atol=2e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("other", ["center-attention", "attn-scale?start=0.5", "learned-sink?start=0"])
@pytest.mark.parametrize("order", [1, -1])
def test_at_first_it_changes_nothing_of_what_another_remedy_makes(attention, other, order):
    if attention == "sdpa" and "sink" in other:
        return  # refused there
    model = _made(hf.LlamaModel, hf.LlamaConfig, **TEXT, attn_implementation=attention)
    with torch.no_grad():
        with fullrank.repair(model, other, batch={"input_ids": IDS}):
            expected = model(IDS, use_cache=False)[0]
        with fullrank.repair(model, ["differential", other][::order], batch={"input_ids": IDS}):
            torch.testing.assert_close(model(IDS, use_cache=False)[0], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("remedy", ["differential", "differential?strength=0.9&second=features"])
def test_at_first_it_is_the_same_function_to_the_last_bit_in_half_precision_too(dtype, attention, remedy):
    if attention == "eager" and "features" in remedy:
        return
    model = _made(hf.LlamaModel, hf.LlamaConfig, dtype, **TEXT, attn_implementation=attention)
    with torch.no_grad():
        before = model(IDS, use_cache=False)[0]
        with fullrank.repair(model, remedy, batch={"input_ids": IDS}):
            assert torch.equal(model(IDS, use_cache=False)[0], before)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_noise_of_attention_dropout_is_no_larger_than_without_it(attention):
    """At first, for the same draws, the outputs in training are those of the model as it was."""
    options = {"vocab_size": 50, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 16, "attn_pdrop": 0.3}
    options |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "initializer_range": 0.5, "attn_implementation": attention}
    model = _made(hf.GPT2Model, hf.GPT2Config, **options).train()

    def drawn(seed):
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed)
            return model(IDS, use_cache=False)[0]

    before = [drawn(seed) for seed in range(3)]
    assert not torch.allclose(before[0], before[1], atol=1e-2)
    with fullrank.repair(model, "differential?strength=0.8", batch={"input_ids": IDS}):
        for seed, expected in enumerate(before):
            torch.testing.assert_close(drawn(seed), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("remedy", ["differential", "differential?norm=head"])
def test_the_weight_that_reads_its_output_is_found_all_the_same(remedy):
    model = _made(hf.LlamaModel, hf.LlamaConfig, **TEXT)
    with fullrank.repair(model, remedy, batch={"input_ids": IDS}), torch.no_grad():
        (stack,) = survey(model, lambda: model(IDS, use_cache=False)).stacks
    assert [weight.reason for weight in stack.weights[0] if weight.role == "o"] == [""]
