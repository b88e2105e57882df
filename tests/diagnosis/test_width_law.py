"""Width slopes of random networks agree with the random-matrix law, where that law's assumptions hold.

The law: rows of independent Gaussian logits of a spread that does not depend on the context, over values that know
nothing of them. Networks are brought there by tokens that are independent and centred (no positions, no token types,
every word once) and by queries and keys scaled to logits of order one, with few tokens for their width.
"""

import math

import numpy as np
import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2Model, RobertaConfig, RobertaModel, ViTConfig, ViTModel

import fullrank
from fullrank import metrics
from fullrank.capture.events import StreamState
from fullrank.diagnosis import Evidence
from fullrank.diagnosis.context_dilution import FAILURE as DILUTION
from fullrank.diagnosis.over_contexts import growths
from fullrank.diagnosis.rank_collapse_width import FAILURE as WIDTH
from fullrank.measure import StreamObserver
from fullrank.operators.markov import gaussian_logit_markov, lognormal_markov
from golden import assert_golden

CONTEXTS = (16, 32, 64)
WIDTH_OF_MODELS, HEADS, WORDS, SEQUENCES = 512, 2, 600, 8
SPREAD = 0.6  # of the logits: of order one, and finite contexts still near their limit
SHAPES = ("roberta", "gpt2", "vit")


class Patches(nn.Module):
    """The blocks of a vision transformer over embedded patches, however many there are."""

    def __init__(self, config):
        super().__init__()
        whole = ViTModel(config, add_pooling_layer=False)
        self.blocks = next(module for module in whole.modules() if isinstance(module, nn.ModuleList))
        self.norm = nn.LayerNorm(config.hidden_size)

    def forward(self, patches):
        for block in self.blocks:
            out = block(patches)
            patches = out[0] if isinstance(out, tuple) else out
        return self.norm(patches)


def network(shape):
    """One default-initialised block of the shape."""
    common = {"hidden_size": WIDTH_OF_MODELS, "num_hidden_layers": 1, "num_attention_heads": HEADS,
              "intermediate_size": 32}  # fmt: skip
    words = {"vocab_size": WORDS, "max_position_embeddings": 80}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        match shape:
            case "roberta":
                return RobertaModel(RobertaConfig(**common, **words), add_pooling_layer=False).eval()
            case "gpt2":
                special = {"bos_token_id": 0, "eos_token_id": 0, "n_inner": 32}
                return GPT2Model(GPT2Config(n_embd=WIDTH_OF_MODELS, n_layer=1, n_head=HEADS, n_positions=80,
                                            vocab_size=WORDS, **special)).eval()  # fmt: skip
            case _:
                return Patches(ViTConfig(**common, image_size=32, patch_size=8)).eval()


@torch.no_grad()
def as_the_law_assumes(shape, model, spread=SPREAD):
    """Tokens independent and centred; queries and keys of iid weights such that logits have the wanted spread."""
    if shape == "roberta":
        model.embeddings.position_embeddings.weight.zero_()
        model.embeddings.token_type_embeddings.weight.zero_()
    elif shape == "gpt2":
        model.wpe.weight.zero_()
    # a normalised token has d entries of variance 1: logits of weights of std w have the spread d w²
    scale = math.sqrt(spread / (WIDTH_OF_MODELS * 0.02**2))
    for name, weight in model.named_parameters():
        if "c_attn.weight" in name:
            weight[:, : 2 * WIDTH_OF_MODELS] *= scale
        elif any(part in name for part in ("query.weight", "key.weight", "q_proj.weight", "k_proj.weight")):
            weight *= scale
    return model


def batch(shape, model):
    generator = torch.Generator().manual_seed(1)
    if shape == "vit":
        return torch.randn(SEQUENCES, CONTEXTS[-1], WIDTH_OF_MODELS, generator=generator)
    return {"input_ids": torch.stack([torch.randperm(WORDS - 5, generator=generator)[: CONTEXTS[-1]] + 5
                                      for _ in range(SEQUENCES)])}  # fmt: skip


def examined(shape, *, spread=None):
    """At default initialisation, or as the law assumes with logits of this spread."""
    model = network(shape)
    if spread is not None:
        as_the_law_assumes(shape, model, spread)
    return fullrank.examine(model, batch(shape, model), contexts=CONTEXTS, spectrum=False)


def exponent(values, contexts=CONTEXTS):
    return np.polyfit(np.log(contexts), np.log(values), 1)[0]


def gain_of_random_attention(T, spread, *, causal, maps=400):
    """√(Y₂ − ‖c‖²) of maps of independent Gaussian logits: all queries, or the late ones."""
    A = gaussian_logit_markov(T, spread, generator=torch.Generator().manual_seed(T), lead=(maps,), causal=causal,
                              dtype=torch.float64)  # fmt: skip
    rows = torch.arange(T) >= T // 2 if causal else None
    Y2, c = metrics.inverse_participation(A, rows=rows), metrics.column_mean(A, rows=rows)
    return float((Y2 - c.square().sum(-1)).mean().sqrt())


# ------------------------------------------------------------ the law itself


@pytest.mark.parametrize("causal", [False, True], ids=["full", "late queries of causal attention"])
def test_random_attention_passes_on_differences_like_one_over_the_root_of_the_context(causal):
    """σ/√T for full attention, √((0.159 + 1.386 σ²)/T) for late queries; values are looked at, not the formula."""
    contexts, spread, found = (128, 256, 512), 0.5, []
    variance = math.exp(spread**2) - 1
    for T in contexts:
        generator = torch.Generator().manual_seed(T)
        A = gaussian_logit_markov(T, spread, generator=generator, lead=(4,), causal=causal, dtype=torch.float64)
        V = torch.randn(T, 1024, generator=generator, dtype=torch.float64)
        visible = torch.ones(T, T, dtype=torch.bool).tril() if causal else None
        found.append(float(metrics.contrast_gain(A, V, visible, torch.arange(T) >= T // 2 if causal else None).mean()))
    constant = 0.159 + 1.386 * variance if causal else variance
    np.testing.assert_allclose(found, [math.sqrt(constant / T) for T in contexts], rtol=0.03)
    assert exponent(found, contexts) == pytest.approx(-0.5, abs=0.02)


def test_beyond_the_width_of_the_model_the_law_ends():
    """Keys and values of the same d directions: the squared gain is σ²/T + s²/d, and a context lowers only the one."""
    d, spread, contexts = 64, 0.5, (64, 512, 2048)
    g = torch.Generator().manual_seed(0)
    W_Q, W_K, W_V = (torch.randn(d, d, generator=g) * math.sqrt(spread**share / d) for share in (1, 1, 0))
    found = []
    for T in contexts:
        X = torch.randn(T, d, generator=g)
        A = ((X @ W_Q) @ (X @ W_K).T / math.sqrt(d)).softmax(-1)
        found.append(float(metrics.contrast_gain(A, X @ W_V)))
    expected = [math.sqrt((math.exp(spread**2) - 1) / T + spread**2 / d) for T in contexts]
    np.testing.assert_allclose(found, expected, rtol=0.15)
    assert exponent(found[1:], contexts[1:]) > -0.25


# ------------------------------------------------------------ late queries of causal attention, as they are examined


def late_ranks(T, *, centred):
    """Gram stable rank of A X W as the observer of states gives it, over late tokens, and over all; mean over draws.

    Single draws of 64 tokens spread by 5 %, so that there are more of them.
    """
    states, everything = [], []
    for seed in range(2048 // T):
        generator = torch.Generator().manual_seed(seed)
        A = lognormal_markov(T, generator=generator, causal=True)
        if centred:
            A = A - torch.ones(T, T).tril() / torch.arange(1, T + 1)[:, None]
        # X is isometric and square: A X W is A times a Gaussian matrix in distribution
        states.append(A @ torch.randn(T, T, generator=generator))
        everything.append(metrics.gram_stable_rank(states[-1]))
    observer = StreamObserver(causal=["decoder"])
    observer.see(StreamState("decoder", 0, "stream", "out", "", torch.stack(states)))
    (row,) = [row for row in observer.rows() if (row.metric, row.scope) == ("gram_stable_rank", "late")]
    return row.value, float(torch.stack(everything).mean())


def test_late_queries_collapse_in_width_where_the_mean_over_all_rows_hides_it():
    """Golden `mtg-causal-late`, from the rows that examine gives; `mtg-causal-sr`, over all rows, stays where it is."""
    contexts = (64, 256, 1024)
    late, everything = zip(*(late_ranks(T, centred=False) for T in contexts), strict=True)
    assert_golden("mtg-causal-late", late)
    for found in everything:
        assert_golden("mtg-causal-sr", found)
    assert exponent([rank - 1 for rank in late], contexts) < -0.5
    assert exponent([rank - 1 for rank in everything], contexts) > -0.25


def test_less_the_running_mean_late_queries_keep_a_rank_that_grows_with_the_context():
    late, everything = zip(*(late_ranks(T, centred=True) for T in (64, 256, 1024)), strict=True)
    assert_golden("mtg-causal-late-centred", late)
    for found in everything:
        assert_golden("mtg-causal-sr-centred", found)


# ------------------------------------------------------------ networks


@pytest.mark.parametrize("shape", SHAPES)
def test_the_width_slope_of_a_random_network_holds_the_law_in_its_interval(shape):
    report = examined(shape, spread=SPREAD)
    (layer,) = growths(Evidence.of(report), "contrast_gain")
    causal = shape == "gpt2"
    spreads = [row.value for row in report.rows.where(metric="logit_std") if row.scope.endswith("+context=64")]
    assert np.mean(spreads) == pytest.approx(SPREAD, rel=0.1)  # the assumption
    law = exponent([gain_of_random_attention(T, SPREAD, causal=causal) for T in CONTEXTS])
    assert layer.together.low <= law <= layer.together.high < 0
    assert layer.together.high - layer.together.low < 0.2  # an interval that says something
    assert law == pytest.approx(-0.5, abs=0.1)  # of so few tokens


def test_heads_that_choose_their_keys_are_outside_the_law():
    """Logits five times as spread out: a few keys take all, whatever the context, and the slope says so."""
    (layer,) = growths(Evidence.of(examined("vit", spread=5 * SPREAD)), "contrast_gain")
    assert layer.together.low > -0.25
    assert layer.size(CONTEXTS[-1]) > 0.5


@pytest.mark.parametrize("shape", SHAPES)
def test_at_default_initialisation_every_head_falls_and_fresh_weights_get_no_verdict(shape):
    """Positions, shared token types and small logits break the law's assumptions, not its sign."""
    report = examined(shape)
    evidence = Evidence.of(report, weights="fresh")
    for layer in growths(evidence, "contrast_gain"):
        assert layer.together.high < 0
        assert all(head.high < 0 for head in layer.exponents.values())
    looked = WIDTH.look(evidence)
    assert looked.clear
    assert not looked.suspicions
    for layer in growths(evidence, "effective_keys"):  # all keys are attended to
        assert layer.together.value == pytest.approx(1, abs=0.05)
    assert DILUTION.valid_for == "trained"
