"""The (q, p) map meets what other papers' networks were measured to do."""

import math

from fullrank.architecture import Architecture
from fullrank.theory.giorlandino_goldt_course import course, final
from golden import assert_golden


def stack(depth: int = 24, *, scale: float = 1.0, **fields: object) -> Architecture:
    """24 layers, d = 128, H = 4, T = 32, GELU, weights of variance 1/fan_in; outputs of branches times `scale`."""
    std = 128**-0.5
    weights = {"std_q": std, "std_k": std, "std_v": std, "std_up": std}
    outputs = {"std_o": scale * std, "std_down": scale * 512**-0.5}
    return Architecture(depth=depth, width=128, heads=4, context=32, **{**weights, **outputs, **fields})


def last(architecture: Architecture) -> tuple[float, float, float]:
    """Variance, residual and cosine after the last layer."""
    found = course(architecture)
    rho = float(found.similarity[-1])
    return float(found.q[-1]), math.sqrt((1 - 1 / architecture.context) * (1 - rho)), rho


def test_pre_norm_stacks_grow_and_collapse_as_measured():
    assert_golden("rs-preln", last(stack()))
    assert_golden("rs-gpt2-init", last(stack(scale=48**-0.5)))
    variance, residual, cosine = last(stack(48))
    assert_golden("rs-depth-48", [residual, cosine, variance])
    q = course(stack()).q
    assert_golden("rs-variance-linear", [q[1], q[24]])


def test_post_norm_stacks_collapse_as_measured():
    assert_golden("rs-postln", last(stack(placement="post"))[2])
    assert_golden("rs-depth-6", [*last(stack(6))[1:], *last(stack(6, placement="post"))[1:]])


def noci(rho: float, *, activation: str = "identity", qk: float = 0.0) -> Architecture:
    """T = 32, d = 128, one head, no norms, branches over √24; the ReLU's second weight has twice the variance."""
    std = 128**-0.5
    return Architecture(
        depth=24,
        width=128,
        mlp_width=128,
        context=32,
        std_q=qk * std,
        std_k=qk * std,
        std_v=std,
        std_o=std,
        std_up=std,
        std_down=std * (math.sqrt(2) if activation == "relu" else 1),
        activation=activation,
        norm="none",
        placement="none",
        attention_branch=24**-0.5,
        mlp_branch=24**-0.5,
        correlation=rho,
    )


def test_with_uniform_attention_and_a_linear_mlp_it_is_nocis_closed_form():
    both = [course(noci(rho)) for rho in (0.0, 0.2)]
    assert_golden("noci-closed-form-rho", [one.similarity[-1] for one in both])
    assert_golden("noci-closed-form-norm", [one.q[-1] for one in both])
    assert_golden("noci-simulated-uniform-linear", [one.similarity[-1] for one in both])


def test_softmax_and_relu_change_it_as_simulated():
    assert_golden("noci-simulated-softmax-linear", course(noci(0.2, qk=1.0)).similarity[-1])
    assert_golden("noci-softmax-norm", course(noci(0.0, qk=1.0)).q[-1])
    assert_golden("noci-relu-breaks", [course(noci(rho, activation="relu")).similarity[-1] for rho in (0.0, 0.2)])


def test_the_gauge_of_default_initialisations_is_the_golden_one():
    wide = {"depth": 1, "width": 768, "context": 512}
    default, fan_in = (Architecture(**wide, std_q=std, std_k=std) for std in (0.02, 768**-0.5))
    assert_golden("en-default-gauge", [default.gauge, fan_in.gauge])


def test_a_fresh_roberta_and_what_centring_makes_of_it():
    roberta = Architecture(depth=12, width=768, heads=12, placement="post", context=282, correlation=0.33)
    last = [float(final(roberta, centred=centred).similarity) for centred in (False, True)]
    assert_golden("mtg-roberta-rho", [roberta.correlation, *last])
