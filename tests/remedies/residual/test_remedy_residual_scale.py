"""Residual scaling: blocks by hand, models built with it, and the cards' deep models with it."""

import pytest
import torch
from blocks import NAMES, by_hand, close, repaired
from schemes import cosine, deep, gradients, repaired_states, residual, states, variance

import fullrank
from fullrank.errors import RemedyError
from golden import assert_golden

FACTORS = {"sqrt-branches": 6**-0.5, "sqrt-depth": 3**-0.5, "depth": 1 / 3, "number": 1.0}


@pytest.mark.parametrize("name", NAMES)
def test_branches_are_scaled_each_by_its_own_factor(name):
    found, added = repaired(name, "residual-scale", by="sqrt-depth", alpha=0.9, mlp=0.4)
    beta = {"attention": 0.9 * 3**-0.5, "mlp": 0.4 * 3**-0.5}
    close(found, by_hand(name, lambda layer, branch, X, F: X + beta[branch] * F))
    assert not added


@pytest.mark.parametrize("by", FACTORS)
def test_the_rules_of_depth(by):
    found, _ = repaired("gpt2", "residual-scale", by=by, alpha=0.5)
    close(found, by_hand("gpt2", lambda layer, branch, X, F: X + 0.5 * FACTORS[by] * F))


@pytest.mark.parametrize("name", NAMES)
def test_with_the_skip_scaled_the_squares_sum_to_one(name):
    found, _ = repaired(name, "residual-scale", by="number", attention=0.6, mlp=1.0, skip="variance")
    factors = {"attention": (0.8, 0.6), "mlp": (0.0, 1.0)}
    close(found, by_hand(name, lambda layer, b, X, F: factors[b][0] * X + factors[b][1] * F))


@pytest.mark.parametrize("placement", ["pre", "post", "peri", "res-post"])
@pytest.mark.parametrize("parallel", [False, True])
def test_a_plain_model_becomes_the_one_that_is_built_with_it(placement, parallel):
    sizes = {"width": 32, "placement": placement, "parallel": parallel}
    model, X = deep(3, **sizes)
    for skip, factor in (("one", 1.0), ("variance", (1 - 1 / 6) ** 0.5)):
        twin, _ = deep(3, residual_scale=6**-0.5, skip_scale=factor, **sizes)
        with torch.no_grad(), fullrank.repair(model, f"residual-scale?skip={skip}", batch={"inputs_embeds": X}):
            close(model(inputs_embeds=X).logits, twin(inputs_embeds=X).logits, 1e-4)


def test_a_factor_that_leaves_nothing_to_the_skip_is_refused():
    model, X = deep(2, width=32)
    with pytest.raises(RemedyError, match=r"at most 1, and that of attention is 1\.5; choose a smaller alpha"):
        fullrank.repair(model, "residual-scale?by=number&alpha=1.5&skip=variance", batch={"inputs_embeds": X})
    model, X = deep(2, width=32, parallel=True)
    with pytest.raises(RemedyError, match="one factor for branches that are summed before they are added"):
        fullrank.repair(model, "residual-scale?attention=0.1&skip=variance", batch={"inputs_embeds": X})


# ------------------------------------------------------------ initial profiles of residual schemes


SEEDS = range(8)


def mean(rows):
    return torch.tensor(rows, dtype=torch.float64).mean(0).tolist()


def profile(depth=24, **options):
    """[variance after the first block, after the last, residual, cosine], means over draws."""
    return mean([_ends(states(*deep(depth, seed=seed, **options))) for seed in SEEDS])


def _ends(X):
    return [variance(X[1]), variance(X[-1]), residual(X[-1]), cosine(X[-1])]


def test_profiles_without_it():
    first, *last = profile()
    assert_golden("rs-preln", last)
    assert_golden("rs-variance-linear", [first, last[0]])
    _, grown, kept, alike = profile(48)
    assert_golden("rs-depth-48", [kept, alike, grown])
    post = profile(placement="post")
    assert_golden("rs-postln", post[3])
    assert post[2] < 0.01
    assert_golden("rs-depth-6", [*profile(6)[2:], *profile(6, placement="post")[2:]])


def test_with_it_tokens_stay_apart_and_queries_get_gradients():
    plain, scaled, ends = [], [], []
    repaired_model, X = deep()
    with fullrank.repair(repaired_model, "residual-scale", batch={"inputs_embeds": X}):
        for seed in SEEDS:
            model, X = deep(seed=seed)
            plain.append(gradients(model, X, seed=seed))
            repaired_model.load_state_dict(model.state_dict() | _record(repaired_model))
            scaled.append(gradients(repaired_model, X, seed=seed))
            ends.append(_ends(states(repaired_model, X)))
    assert_golden("rs-gpt2-init", mean(ends)[1:])  # the same function
    assert_golden("rs-branch-sqrt2L", mean(scaled))
    assert all(one[0] < other[0] for one, other in zip(scaled, plain, strict=True))
    assert all(one[1] > 3 * other[1] for one, other in zip(scaled, plain, strict=True))


def _record(model):
    return {name: value for name, value in model.state_dict().items() if "fullrank" in name}


def test_under_post_norm_too():
    model, X = deep(placement="post")
    assert residual(states(model, X)[-1]) < 0.01
    assert residual(repaired_states(model, X, "residual-scale")[-1]) > 0.9


def test_as_scaled_weights_in_function_and_not_in_gradients():
    model, X = deep(6)
    found, grads = [], []
    for remedy in ("residual-scale", "scaled-init"):
        with fullrank.repair(model, remedy, batch={"inputs_embeds": X}):
            found.append(states(model, X)[-1])
            grads.append(gradients(model, X)[0])
    torch.testing.assert_close(*found, rtol=0, atol=1e-4)
    assert grads[0] < 0.6 * grads[1]
