"""Temperature against its definition on dense maps, its calibrations, and what its laws keep."""

import math

import pytest
import torch
import transformers as hf
from attending import MASKS, dense_softmax, real_rows, repaired_and_seen, tolerance
from calls import explicit, normal

import fullrank
from fullrank.errors import RemedyError
from fullrank.remedies.attention.temperature import Temperature, balanced_temperature, temperature_for_entropy
from golden import assert_golden, golden

LAWS = {"fixed": lambda n: torch.ones_like(n), "log-context": torch.log, "root-log-context": lambda n: n.log().sqrt()}


def _scaled(call, tau):
    """Scores with τ on them: biases that a kernel adds are not multiplied."""
    if call.q is None:
        return call.s * tau
    return call.s + (tau - 1) * call.scale * call.q @ call.k.mT


def _modules(case):
    return [m for n, m in case.model.named_modules() if n.endswith("fullrank_temperature_before")]


@pytest.mark.parametrize("kind", LAWS)
@pytest.mark.parametrize("mask", MASKS)
def test_scores_are_multiplied_by_head_and_number_of_visible_keys(mask, kind):
    case = MASKS[mask]()
    with repaired_and_seen(case, "temperature", kind=kind) as (_, calls):
        seen = [call for call in calls() if call.part == "self"]
        assert len(seen) == len(_modules(case))
        for call, module in zip(seen, _modules(case), strict=True):
            n = call.visible.sum(-1, keepdim=True).double().clamp(min=1)
            tau = module.per_head.detach()[:, None, None] * LAWS[kind](n)
            expected = dense_softmax(_scaled(call, tau)) @ call.v
            rows = real_rows(case, call)
            torch.testing.assert_close(call.output[rows], expected[rows], rtol=0, atol=tolerance(mask))


@pytest.mark.parametrize(("kind", "length"), [("log-context", 9), ("log-context", 64), ("root-log-context", 64)])
def test_a_law_leaves_scores_as_they_are_at_its_length(kind, length):
    case = MASKS["full"]()
    with fullrank.repair(case.model, "temperature", kind=kind, length=length, batch=case.batch):
        law = LAWS[kind](torch.tensor(float(length)))
        for module in _modules(case):
            torch.testing.assert_close(module.per_head * law, torch.ones(4).double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("target", [0.4, 0.8])
@pytest.mark.parametrize("mask", ["full", "causal", "causal, explicit softmax", "padded", "causal window", "biased"])
def test_calibration_meets_the_target_in_every_head_of_every_layer(mask, target):
    case = MASKS[mask]()
    with repaired_and_seen(case, "temperature", stirred=False, kind="entropy", target=target) as (_, calls):
        for call, module in zip([c for c in calls() if c.part == "self"], _modules(case), strict=True):
            A = dense_softmax(_scaled(call, module.per_head.detach()[:, None, None]))
            n = call.visible.sum(-1)
            H = -torch.special.xlogy(A, A).sum(-1) / n.clamp(min=2).log()
            padding = case.batch.get("attention_mask")
            real = torch.ones(H.shape[0], H.shape[2]) if padding is None else padding
            mean = [H[:, h][(n[:, h] > 1) & real.bool()].mean() for h in range(4)]
            torch.testing.assert_close(torch.stack(mean), torch.full((4,), target).double(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("left", [False, True])
def test_calibration_does_not_ask_how_long_the_padding_is(attention, left):
    options = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    options |= {"intermediate_size": 32, "initializer_range": 0.5, "attn_implementation": attention}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = hf.BertModel(hf.BertConfig(**options)).double().eval()
    ids = torch.randint(1, 50, (2, 7), generator=torch.Generator().manual_seed(0))
    found = []
    for padding in (0, 20):
        more = torch.zeros(2, padding, dtype=torch.long)
        parts = [(more, ids), (more, torch.ones_like(ids))] if left else [(ids, more), (torch.ones_like(ids), more)]
        given, real = (torch.cat(part, 1) for part in parts)
        place = (real.cumsum(1) - 1).clamp(min=0)
        batch = {"input_ids": given, "attention_mask": real, "position_ids": place}
        with fullrank.repair(model, "temperature?kind=entropy&target=0.6", batch=batch):
            found.append(torch.stack([p.detach() for n, p in model.named_parameters() if n.endswith("per_head")]))
    torch.testing.assert_close(found[1], found[0], rtol=1e-6, atol=0)
    assert not torch.allclose(found[0], torch.ones_like(found[0]), atol=1e-2)


def test_a_head_that_cannot_meet_the_target_is_left_alone():
    s = torch.stack([torch.zeros(6, 6), normal(6, 6).float()])[None]
    assert temperature_for_entropy(s, None, 0.5)[0] == 1
    assert temperature_for_entropy(s, None, 0.5)[1] != 1


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.9])
def test_balance_is_the_ratio_of_the_gradients_of_values_and_queries(rho):
    """Tokens on a simplex of cosine ρ and norm √d; E‖∂S/∂W_V‖²/E‖∂S/∂W_Q‖² = τ*² at τ = 1."""
    T = d = 64
    basis = torch.linalg.qr(normal(T + 1, T + 1)).Q[:, :-1]
    if rho == 0:
        X = basis[:-1] @ torch.linalg.qr(normal(d, d)).Q
        X = torch.linalg.qr(X).Q
    else:
        X = math.sqrt(1 - rho) * torch.eye(T).double() + (math.sqrt(1 + (T - 1) * rho) - math.sqrt(1 - rho)) / T
    X = math.sqrt(d) * torch.nn.functional.normalize(X, dim=-1)
    expected = math.sqrt(d * (1 + (T - 1) * rho) / ((T + d) * (1 - rho) ** 2))
    assert float(balanced_temperature(X[None])) == pytest.approx(expected, rel=1e-6)
    if rho > 0:
        assert float(balanced_temperature(X.roll(1, 0)[None])) == pytest.approx(expected, rel=1e-6)


def test_measured_gradients_of_queries_and_values_meet_at_the_balanced_temperature():
    """With attention uniform (W_Q = 0), as in the paper; a mean over ten draws of the weights."""
    T = d = 32
    X = normal(T, d) + 1.0 * normal(1, d, seed=1)
    X = math.sqrt(d) * torch.nn.functional.normalize(X, dim=-1)
    tau = float(balanced_temperature(X[None]))
    assert tau > 1.3
    square = {"v": 0.0, "q": 0.0}
    for seed in range(10):
        Wk, Wv = (normal(d, d, seed=10 * seed + n) / math.sqrt(d) for n in (2, 3))
        Wq = torch.zeros(d, d, dtype=torch.float64)

        def output(Wq, Wv, Wk=Wk):
            return torch.softmax(tau * (X @ Wq) @ (X @ Wk).mT / math.sqrt(d), -1) @ X @ Wv

        Jq, Jv = torch.autograd.functional.jacobian(output, (Wq, Wv))
        square["q"] += float(Jq.square().sum())
        square["v"] += float(Jv.square().sum())
    assert square["v"] / square["q"] == pytest.approx(1.0, rel=0.35)


def test_padding_is_no_token_of_the_mean_cosine():
    X = normal(2, 6, 8)
    padded = torch.cat([X, 5 * torch.ones(2, 3, 8)], 1)
    real = torch.arange(9).expand(2, 9) < 6
    torch.testing.assert_close(balanced_temperature(padded, real), balanced_temperature(X))


def test_golden_entropy_of_random_scores_under_the_root_log_law():
    """gg-rem-entropy: scores N(0, 1) under √log n with factor b."""
    assert golden("gg-rem-entropy")["setting"].endswith("b = .25, 1, sqrt(2), 3")
    logits = normal(1, 1, 2000, 512)
    found = []
    for b in (0.25, 1, 2**0.5, 3):
        module = _module("root-log-context", b)
        found.append(float(_entropy(module(explicit(logits)).logits).mean()))
    assert_golden("gg-rem-entropy", found)


def test_for_long_contexts_each_law_keeps_what_it_is_for():
    """Random scores keep their normalised entropy under √log n; a margin of cosines keeps its weight under log n."""
    random, margin = {}, {}
    for kind in LAWS:
        random[kind], margin[kind] = [], []
        for T in (64, 4096):
            module = _module(kind, 1.0)
            noise = normal(1, 1, 200, T)
            random[kind].append(1 - float(_entropy(module(explicit(0.6 * noise)).logits).mean()))
            planted = torch.zeros(1, 1, 1, T).double()
            planted[..., 0] = 1.2  # the one key that the query means
            margin[kind].append(float(torch.softmax(module(explicit(planted)).logits, -1)[..., 0]))
    kept = {kind: after / before for kind, (before, after) in random.items()}  # of what is missing to full entropy
    assert 0.85 < kept["root-log-context"] < 1.15
    assert kept["fixed"] < 0.6  # dilution
    assert kept["log-context"] > 1.4  # too sharp for random scores
    assert margin["log-context"][1] > margin["log-context"][0] > 0.6
    assert margin["root-log-context"][1] < 0.02
    assert margin["fixed"][1] < 0.001


def test_ranges_are_kept():
    case = MASKS["full"]()
    for parameters, words in (
        ({"kind": "log"}, "log-context"),
        ({"scale": 0.0}, "above 0"),
        ({"target": 1.0}, "at most 0.99"),
        ({"length": 1}, "at least 2"),
    ):
        with pytest.raises(RemedyError, match=words):
            fullrank.repair(case.model, "temperature", batch=case.batch, **parameters)


def _module(kind, factor):
    return Temperature(1, factor, kind, learnable=False, target=0.7, most=10.0).double().requires_grad_(False)


def _entropy(logits):
    A = torch.softmax(logits, -1)
    return -torch.special.xlogy(A, A).sum(-1) / math.log(logits.shape[-1])
