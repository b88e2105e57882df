"""Collapse in width, with the gap and without, against products of random matrices; and the rows of an architecture."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

import fullrank
from fullrank.architecture import Architecture
from fullrank.theory.fuss_catalan import moment, rank_share, rectangular_rank_share, upper_edge
from fullrank.theory.mind_the_gap import (
    MIND_THE_GAP,
    branch_energy,
    contrast_gain,
    gradient_exponent,
    gradient_square,
    mean_dominated_stable_rank,
    stable_rank,
    stable_rank_centred,
)
from fullrank.theory.mind_the_gap_spectra import deviation_of_logits
from golden import assert_golden


def markov(tokens, s, generator):
    A = np.exp(generator.normal(0.0, s, (tokens, tokens)))
    return A / A.sum(-1, keepdims=True)


def rank_of(X):
    values = np.linalg.svd(X, compute_uv=False)
    return (values**4).sum() / values[0] ** 4


# ------------------------------------------------------------ golden numbers


def test_collapse_in_width_meets_its_golden_numbers():
    layers = np.array([1, 2, 3])
    assert_golden("mtg-width-collapse-constant", (stable_rank(layers, tokens=400) - 1) * 400.0 ** (2 * layers - 1))
    sizes = np.array([50, 100, 200, 400])
    slopes = [np.polyfit(np.log(sizes), np.log(stable_rank(one, tokens=sizes) - 1), 1)[0] for one in (1, 2)]
    assert_golden("mtg-width-collapse-slope", slopes)
    deviation = deviation_of_logits(1.0)
    assert_golden("mtg-kq-sr", stable_rank(1, tokens=np.array([50, 150, 350]), deviation=deviation) - 1)
    # a differential layer is one of deviation σ √(1 + λ²)/(1 − λ)
    differential = [*stable_rank(1, tokens=600, deviation=np.array([1.0, math.sqrt(1.25) / 0.5])).tolist()]
    assert_golden("of-diff-sr", [*differential, float(stable_rank_centred(1, tokens=600))])


def test_without_the_gap_ranks_are_those_of_fuss_and_catalan():
    assert_golden("mtg-fix-fuss-catalan", stable_rank_centred(np.arange(1, 5), tokens=400) / 400)
    np.testing.assert_allclose(rank_share(2 * np.arange(1, 5)), [0.0658, 0.0336, 0.0225, 0.0169], atol=6e-5)


def test_branch_energy_meets_its_golden_numbers():
    T = 150
    Y2 = (1 + float(deviation_of_logits(1.0, tokens=T)) ** 2) / T
    assert_golden("mtg-branch-energy", math.sqrt(branch_energy(Y2, tokens=T)))
    sizes = np.array([50, 150, 350])
    Y2 = (1 + np.square(deviation_of_logits(1 / sizes))) / sizes
    assert_golden("mtg-xavier-branch", np.sqrt(branch_energy(Y2, tokens=sizes)))


def test_tokens_with_a_common_part_have_the_golden_stable_rank():
    assert_golden("mtg-embedding-stable-rank", mean_dominated_stable_rank(1 / 3, tokens=282, ratio=282 / 768))


def test_gradients_grow_with_the_golden_exponents():
    sizes = np.array([50, 100, 150, 200, 300])

    def slopes(centred):
        squares = [gradient_square(one, tokens=sizes, width=sizes, centred=centred) for one in (1, 2)]
        return [np.polyfit(np.log(sizes), np.log(one), 1)[0] for one in squares]

    assert_golden("mtg-gradient-exponent-vanilla", slopes(centred=False))
    assert_golden("mtg-gradient-exponent-fix", slopes(centred=True))
    assert gradient_exponent([1, 2, 5]).tolist() == [1, 2, 5]
    assert gradient_exponent([1, 2, 5], centred=True).tolist() == [1, 1, 1]


# ------------------------------------------------------------ against products of matrices, at two sizes


@pytest.mark.parametrize(("tokens", "width"), [(120, 120), (200, 400)])
@pytest.mark.parametrize("centred", [False, True], ids=["with the gap", "without"])
def test_stable_ranks_after_layers_are_those_of_products(tokens, width, centred):
    s, draws, layers = 0.6, 24 if tokens < 150 else 10, 2
    found = np.zeros((draws, layers))
    for seed in range(draws):
        generator = np.random.default_rng(seed)
        X = np.eye(tokens, width)
        for layer in range(layers):
            A = markov(tokens, s, generator) - (1 / tokens if centred else 0)
            X = A @ X @ generator.normal(size=(width, width))
            found[seed, layer] = rank_of(X)
    ells, ratio = np.arange(1, layers + 1), tokens / width
    if centred:
        expected = stable_rank_centred(ells, tokens=tokens, ratio=ratio)
    else:
        deviation = deviation_of_logits(s, tokens=tokens)
        expected, found = stable_rank(ells, tokens=tokens, ratio=ratio, deviation=deviation) - 1, found - 1
    error = found.std(0, ddof=1) / math.sqrt(draws)
    # the edge of a product comes from below as sizes grow, and the second layer's from farther
    assert np.all(np.abs(found.mean(0) - expected) < 3 * error + np.array([0.1, 0.2]) * expected), (found, expected)


def test_deep_products_at_finite_size_keep_more_rank_than_the_limit_says():
    """Golden `mtg-fig7-centred`: ten layers at 150 tokens; the formula is there up to the third."""
    T, layers, draws = 150, 10, 12
    found = np.zeros((draws, layers))
    for seed in range(draws):
        generator = np.random.default_rng(seed)
        X = np.eye(T)
        for layer in range(layers):
            X = (markov(T, math.sqrt(math.log(2)), generator) - 1 / T) @ X @ generator.normal(size=(T, T))
            X /= np.linalg.norm(X)
            found[seed, layer] = rank_of(X)
    assert_golden("mtg-fig7-centred", found.mean(0))
    told = stable_rank_centred(np.arange(1, layers + 1), tokens=T)
    np.testing.assert_allclose(found.mean(0)[:2], told[:2], rtol=0.15)
    assert np.all(found.mean(0)[3:] > 1.2 * told[3:])


def test_fuss_catalan_moments_and_edges_are_those_of_products():
    assert moment(1, np.arange(6)).tolist() == [1, 1, 2, 5, 14, 42]  # Catalan
    assert float(upper_edge(1)) == pytest.approx(4.0)
    n, size = 3, 240
    generator = np.random.default_rng(0)
    product = np.linalg.multi_dot([generator.normal(size=(size, size)) / math.sqrt(size) for _ in range(n)])
    squares = np.linalg.svd(product, compute_uv=False) ** 2
    for order in (1, 2, 3):
        assert np.mean(squares**order) == pytest.approx(float(moment(n, order)), rel=0.1)
    assert squares[0] == pytest.approx(float(upper_edge(n)), rel=0.1)
    np.testing.assert_allclose(rectangular_rank_share([1, 2, 3], [1, 2, 3]), rank_share([2, 4, 6]))


@pytest.mark.parametrize(("tokens", "width"), [(30, 40), (80, 60)])
@pytest.mark.parametrize("centred", [False, True], ids=["with the gap", "without"])
@pytest.mark.parametrize("depth", [1, 3])
def test_gradients_of_the_first_weight_are_those_of_products(tokens, width, centred, depth):
    """Σ over the Jacobian's entries factors into ‖A_L ⋯ A_1 X_0‖² ‖W_2 ⋯ W_L‖²; both factors are simulated."""
    s, draws = 0.7, 40
    deviation = deviation_of_logits(s, tokens=tokens)
    generator, found = np.random.default_rng(depth), []
    for _ in range(draws):
        mixed, weights = np.eye(tokens), np.eye(width)
        for layer in range(depth):
            mixed = (markov(tokens, s, generator) - (1 / tokens if centred else 0)) @ mixed
            if layer:
                weights = weights @ generator.normal(size=(width, width))
        found.append(np.square(mixed).sum() * np.square(weights).sum())
    expected = float(gradient_square(depth, tokens=tokens, width=width, deviation=deviation, centred=centred))
    assert abs(np.mean(found) - expected) < 4 * np.std(found) / math.sqrt(draws) + 0.01 * expected


@pytest.mark.parametrize(("tokens", "rho"), [(100, 0.0), (300, 0.3)])
def test_branch_energy_and_contrast_are_those_of_random_maps(tokens, rho):
    s, width = 0.6, 400
    generator = np.random.default_rng(1)
    A = markov(tokens, s, generator)
    own, common = generator.normal(size=(tokens, width)), generator.normal(size=(1, width))
    V = math.sqrt(1 - rho) * own + math.sqrt(rho) * common
    Y2 = np.square(A).sum() / tokens
    found = np.square((A - 1 / tokens) @ V).sum() / np.square(A @ V).sum()
    assert found == pytest.approx(float(branch_energy(Y2, tokens=tokens, correlation=rho)), rel=0.1)
    out = A @ V
    gain = np.sqrt(np.square(out - out.mean(0)).sum() / np.square(V - V.mean(0)).sum())
    assert gain == pytest.approx(float(contrast_gain(deviation_of_logits(s, tokens=tokens), tokens=tokens)), rel=0.06)


def test_the_width_law_has_the_exponent_one_half_until_values_know_the_keys():
    T = np.array([256, 1024, 4096])
    assert np.polyfit(np.log(T), np.log(contrast_gain(0.5, tokens=T)), 1)[0] == pytest.approx(-0.5)
    assert float(contrast_gain(0.5, tokens=1e9, shared=0.01)) == pytest.approx(0.1, rel=1e-4)


@pytest.mark.parametrize(("tokens", "width"), [(150, 300), (400, 200)])
def test_mean_dominated_tokens_have_a_stable_rank_near_one(tokens, width):
    generator, rho = np.random.default_rng(2), 0.5
    X = math.sqrt(1 - rho) * generator.normal(size=(tokens, width)) + math.sqrt(rho) * generator.normal(size=(1, width))
    X /= np.linalg.norm(X, axis=1, keepdims=True)
    C = X @ X.T
    found = (C.sum() - tokens) / (tokens * (tokens - 1))
    told = float(mean_dominated_stable_rank(found, tokens=tokens, ratio=tokens / width)) - 1
    assert rank_of(X) - 1 == pytest.approx(told, rel=0.15)


# ------------------------------------------------------------ an architecture

FAN_IN = Architecture(
    depth=3, width=128, heads=4, context=96, norm="layernorm", placement="pre", activation="gelu",
    std_q=128**-0.5, std_k=128**-0.5, std_v=128**-0.5, std_o=128**-0.5,
)  # fmt: skip


def test_rows_are_given_for_every_layer_and_metric_it_says_it_gives():
    for one in (FAN_IN, FAN_IN.with_(mask="causal", stack="decoder")):
        rows = MIND_THE_GAP.rows(one)
        causal = one.mask == "causal"
        wanted = set(MIND_THE_GAP.gives) - ({"bulk_excess"} if causal else set())
        assert {(row.layer, row.metric) for row in rows} == {
            (layer, metric) for layer in (1, 2, 3) for metric in wanted
        }
        assert {(row.scope, row.site, row.part) for row in rows} == {("late" if causal else "all", "attention", "self")}
        assert {row.source for row in rows} == {"theory:mind_the_gap"}


def test_longer_contexts_and_equal_logits_do_to_the_contrast_what_the_width_law_says():
    def gain(**changed):
        (found,) = [
            row.value
            for row in MIND_THE_GAP.rows(dataclasses.replace(FAN_IN, depth=1, **changed))
            if row.metric == "contrast_gain"
        ]
        return found

    wide = {"width": 8192, "head_width": 32, "std_q": 8192**-0.5, "std_k": 8192**-0.5, "logit_scale": 32**-0.5}
    assert gain(context=512, **wide) / gain(context=128, **wide) == pytest.approx(0.5, rel=0.15)
    assert gain(std_q=0.0) == pytest.approx(0.0, abs=1e-3)
    causal = gain(std_q=0.0, mask="causal")
    assert causal == pytest.approx(math.sqrt((6 * math.log(2) - 4) / 96), rel=1e-3)  # averaging's own


def test_it_leaves_out_windows_and_frozen_heads_and_strains_where_rows_are_not_independent():
    assert 0.3 < MIND_THE_GAP.fit(FAN_IN) < 1
    assert MIND_THE_GAP.fit(FAN_IN.with_(window=32)) == 0
    assert "its queries see a window of 32 tokens" in MIND_THE_GAP.reasons(FAN_IN.with_(window=32))
    frozen = FAN_IN.with_(qk_std=0.5)
    assert any("single keys" in why for why in MIND_THE_GAP.reasons(frozen))
    assert MIND_THE_GAP.fit(FAN_IN.with_(context=2048)) < MIND_THE_GAP.fit(FAN_IN)
    from fullrank.theory.giorlandino_goldt import giorlandino_goldt

    assert MIND_THE_GAP.fit(FAN_IN) < giorlandino_goldt.fit(FAN_IN)  # what it takes deeper layers from


def network(shape, tokens, seed):
    from transformers import BertConfig, BertModel, GPT2Config, GPT2Model

    std, words = 128**-0.5, 997
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        batch = {"input_ids": torch.randint(0, words, (4, tokens))}
        if shape == "bert":
            config = BertConfig(
                hidden_size=128, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64, vocab_size=words,
                max_position_embeddings=tokens, initializer_range=std,
            )  # fmt: skip
            return BertModel(config).eval(), batch
        special = {"bos_token_id": 0, "eos_token_id": 0, "n_inner": 64}
        sizes = {"n_embd": 128, "n_layer": 1, "n_head": 4, "n_positions": tokens, "vocab_size": words}
        return GPT2Model(GPT2Config(**sizes, initializer_range=std, **special)).eval(), batch


@pytest.mark.parametrize("shape", ["bert", "gpt2"])
@pytest.mark.parametrize("tokens", [48, 96])
def test_the_first_layer_of_random_networks_is_foretold(shape, tokens):
    ratios = {}
    for seed in range(3):
        model, batch = network(shape, tokens, seed)
        seen = fullrank.examine(model, batch, reference=False).rows
        for row in MIND_THE_GAP.rows(Architecture.from_model(model, batch)):
            where = {"metric": row.metric, "layer": 1, "site": "attention", "scope": row.scope}
            values = [one.value for one in seen.where(**where)]
            ratios.setdefault(row.metric, []).append(row.value / np.mean(values))
    off = {metric: abs(np.mean(found) - 1) for metric, found in ratios.items()}
    limits = {"attention_s1": 0.03, "outlier_share": 0.1, "attention_stable_rank": 0.1, "contrast_gain": 0.08}
    assert {metric: error for metric, error in off.items() if error > limits.get(metric, 0.25)} == {}
