"""Centred attention against its definition on dense maps, what its gains restore, and what it is for."""

import math

import pytest
import torch
from attending import MASKS, real_rows, repaired_and_seen, tolerance
from attention_only import AttentionOnly, residual

import fullrank
from fullrank import metrics
from fullrank.errors import RemedyError
from golden import assert_golden
from untouched import changes, everything


def modules_of(case):
    return [m for n, m in case.model.named_modules() if n.endswith("fullrank_center_attention_after")]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("remedy", ["center-attention", "center-attention?factor=0.5&learn=true"])
def test_the_uniform_part_is_taken_out(remedy, mask):
    case = MASKS[mask]()
    with repaired_and_seen(case, remedy) as (_, calls):
        modules = modules_of(case)
        seen = [call for call in calls() if call.part == "self"]
        assert len(seen) == len(modules)
        for call, module in zip(seen, modules, strict=True):
            gain = 1 if module.gain is None else module.gain.detach()[:, None, None]
            expected = gain * ((call.A - call.U) @ call.v)
            rows = real_rows(case, call)
            torch.testing.assert_close(call.output[rows], expected[rows], rtol=0, atol=tolerance(mask))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("gain", ["energy", "values"])
def test_a_measured_gain_restores_energy_in_every_head_and_layer(gain, mask):
    """On the batch it was measured on: that of AV, or that of V for each token."""
    case = MASKS[mask]()
    with repaired_and_seen(case, "center-attention", gain=gain) as (repair, calls):
        assert repair.parameters == 0
        for call in calls():
            if call.part != "self":
                continue
            rows = real_rows(case, call).expand(call.output.shape[:3])
            found = (call.output.square().sum(-1) * rows).sum((0, 2))
            if gain == "energy":
                expected = ((call.A @ call.v).square().sum(-1) * rows).sum((0, 2))
            else:
                keys = call.visible.any(-2)
                squares = (call.v.square().sum(-1) * keys).sum((0, 2))
                expected = squares / keys.double().sum((0, 2)) * rows.double().sum((0, 2))
            torch.testing.assert_close(found, expected, rtol=3e-5 if "explicit" in mask else 1e-9, atol=0)


def test_no_later_token_is_seen_where_attention_is_causal():
    case = MASKS["causal"]()
    with fullrank.repair(case.model, "center-attention", batch=case.batch), torch.no_grad():
        before = case()
        case.batch["input_ids"] = case.batch["input_ids"].clone()
        case.batch["input_ids"][:, 5:] = (case.batch["input_ids"][:, 5:] + 1) % 50
        torch.testing.assert_close(case()[:, :5], before[:, :5], rtol=0, atol=1e-12)


def test_what_only_averages_has_no_energy_to_restore():
    model = AttentionOnly(tokens=16, width=32, heads=4, layers=2, seed=0)
    with torch.no_grad():
        model.blocks[1].query.zero_()
    state = everything(model)
    with pytest.raises(RemedyError, match=r"blocks\.1: a head there only averages .* use gain=none"):
        fullrank.repair(model, "center-attention?gain=energy", batch={"X": model.start})
    assert changes(state, everything(model)) == []


# ------------------------------------------------------------ what it is for: golden numbers of the cards


def stack(seed, **options):
    return AttentionOnly(**{"tokens": 64, "width": 128, "heads": 4, "layers": 8, "drawn": 1.0, "seed": seed} | options)


def test_without_a_gain_the_stream_fades_and_with_one_it_keeps_its_energy_and_its_differences():
    plain, faded, kept, sizes = [], [], [], []
    for seed in range(3):
        model = stack(seed)
        plain.append(residual(model.states()[-1]))
        with fullrank.repair(model, "center-attention", batch={"X": model.start}):
            faded.append(float(model.states()[-1].square().mean().sqrt()))
        with fullrank.repair(model, "center-attention?gain=values", batch={"X": model.start}):
            last = model.states()[-1]
            kept.append(residual(last))
            sizes.append(float(last.square().mean().sqrt()))
    assert_golden("of-centring-no-gain", torch.tensor(faded).log().mean().exp())
    assert_golden("of-centring-residual", torch.tensor(kept).mean())
    assert max(plain) < 1e-4
    assert min(sizes) > 0.3 and max(sizes) < 3


def test_keys_and_queries_whose_logits_shrink_with_the_stream_are_held_too():
    """Without a gain the stream underflows within a few layers; gains are measured with those before them in force."""
    model = stack(0, drawn=None)
    with fullrank.repair(model, "center-attention", batch={"X": model.start}):
        assert float(model.states()[4].abs().max()) < 1e-30
    with fullrank.repair(model, "center-attention?gain=values", batch={"X": model.start}):
        last = model.states()[-1]
        assert residual(last) > 0.8
        assert 0.3 < float(last.square().mean().sqrt()) < 3


def test_a_measured_gain_is_what_the_closed_form_of_the_branch_energy_says():
    """‖(A−J)V‖/‖AV‖ ≈ √((Y₂ − 1/T)/Y₂) for values without a common direction."""
    lost = []
    for seed in range(4):
        model = stack(seed, tokens=150, width=600, layers=1)
        with fullrank.repair(model, "center-attention?gain=energy", batch={"X": model.start}):
            gain = next(m.gain for m in model.modules() if getattr(m, "gain", None) is not None)
            A = model.blocks[0].logits.softmax(-1)
            Y2 = A.square().sum(-1).mean(-1)
            torch.testing.assert_close(gain, (Y2 / (Y2 - 1 / 150)).sqrt(), rtol=0.06, atol=0)
            lost.append(1 / gain)
    assert_golden("mtg-branch-energy", torch.cat(lost).mean())


def markov(seed, **options):
    """One head of width 150 on isometric tokens, log-normal entries of mean and variance 1."""
    sizes = {"tokens": 150, "width": 150, "heads": 1, "layers": 10, "drawn": math.sqrt(math.log(2)), "value_std": 1.0}
    return AttentionOnly(seed=seed, isometric=True, **(sizes | options))


def ranks(centred, **options):
    found = []
    for seed in range(5):
        model = markov(seed, **options)
        if centred:
            with fullrank.repair(model, "center-attention", batch={"X": model.start}):
                states = model.states()
        else:
            states = model.states()
        found.append(torch.stack([metrics.gram_stable_rank(X / X.abs().max()) for X in states]))
    return torch.stack(found).mean(0)


@pytest.mark.parametrize("norm", ["none", "post"])
@pytest.mark.parametrize("skip", [0.0, 1.0])
def test_with_its_outlier_attention_keeps_one_direction(norm, skip):
    """The four vanilla variants of the paper's figure, value weights at scale 1."""
    for rank in ranks(False, norm=norm, skip=skip):
        assert_golden("mtg-fig7-vanilla", rank)


def test_without_its_outlier_a_normalised_stack_keeps_rank():
    assert_golden("mtg-fig7-centred-ln", ranks(True, norm="post"))


def test_with_a_skip_of_the_usual_scale_centring_keeps_tokens_apart():
    found = ranks(True, skip=1.0, value_std=1 / math.sqrt(150))
    assert_golden("mtg-upscaled-skip-fix", found[[0, 9]])
    assert float(ranks(False, skip=1.0, value_std=1 / math.sqrt(150))[9]) < 1.1


@pytest.mark.slow
def test_causal_attention_keeps_rank_among_late_tokens():
    late, plain = [], []
    for T in (64, 256, 1024):
        found = []
        for seed in range(4):
            model = markov(seed, tokens=T, width=T, layers=1, causal=True)
            plain.append(float(metrics.gram_stable_rank(model.states()[0][T // 2 :])))
            with fullrank.repair(model, "center-attention", batch={"X": model.start}):
                found.append(metrics.gram_stable_rank(model.states()[0][T // 2 :]))
        late.append(torch.stack(found).mean())
    assert max(plain) < 1.2
    assert_golden("mtg-causal-late-centred", late)


@pytest.mark.slow
def test_centring_holds_the_correlation_of_a_whole_encoder_and_not_its_centred_rank():
    """RoBERTa-base as initialised, 282 random tokens: with and without, the centred rank falls alike."""
    import transformers as hf

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = hf.RobertaModel(hf.RobertaConfig(num_attention_heads=12), add_pooling_layer=False).eval()
        ids = torch.randint(5, model.config.vocab_size, (1, 282))
    batch = {"input_ids": ids, "output_hidden_states": True}

    def seen():
        with torch.no_grad():
            states = [X[0].double() for X in model(**batch).hidden_states]
        centred = [metrics.gram_stable_rank(X - X.mean(0)) for X in (states[0], states[-1])]
        return float(metrics.similarity(states[0])), float(metrics.similarity(states[-1])), torch.stack(centred)

    first, last, rank = seen()
    with fullrank.repair(model, "center-attention", batch=batch):
        _, held, rank_with = seen()
    assert_golden("mtg-roberta-rho", [first, last, held])
    assert_golden("mtg-roberta-centred", rank)
    assert_golden("mtg-roberta-centred", rank_with)
