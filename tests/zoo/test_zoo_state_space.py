"""The state-space model against its recurrence, one token after the other."""

import pytest
import torch
from naive_zoo import NaiveStateSpace, batch_for, shaken

from fullrank.zoo import StateSpace, StateSpaceConfig
from fullrank.zoo.state_space import scan

SMALL = {"depth": 2, "width": 6, "states": 3, "vocabulary": 11}
OPTIONS = [
    {},
    {"write": "convex"},
    {"selective": False},
    {"gate": False},
    {"norm": "layernorm"},
    {"placement": "post"},
    {"norm": "none", "placement": "none"},
    {"placement": "none", "final_norm": True},
    {"final_norm": False},
    {"skip_scale": -2.0},
    {"skip_scale": 0.0, "write": "convex"},
    {"steps": (0.5, 0.5)},
    {"states": 1},
]


def named(options):
    return "-".join(f"{name}={value}" for name, value in options.items()) or "default"


def recurrence(A, w):
    h, states = torch.zeros_like(w[:, 0]), []
    for t in range(w.shape[1]):
        h = A[:, t] * h + w[:, t]
        states.append(h)
    return torch.stack(states, 1)


@pytest.mark.parametrize("options", OPTIONS, ids=named)
def test_it_computes_what_its_options_say(options):
    model = shaken(StateSpace(StateSpaceConfig(**SMALL | options)))
    batch = batch_for(model.config)
    torch.testing.assert_close(model(**batch).logits, NaiveStateSpace(model)(batch), rtol=0, atol=1e-10)


def test_padding_writes_nothing():
    model = shaken(StateSpace(StateSpaceConfig(**SMALL)))
    batch = batch_for(model.config) | {"attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 1, 1]])}
    torch.testing.assert_close(model(**batch).logits, NaiveStateSpace(model)(batch), rtol=0, atol=1e-10)


@pytest.mark.parametrize("tokens", [1, 2, 3, 7, 64, 65])
def test_doubling_is_the_recurrence(tokens):
    generator = torch.Generator().manual_seed(tokens)
    A = torch.rand(2, tokens, 3, 2, generator=generator, dtype=torch.float64)
    w = torch.randn(A.shape, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(scan(A, w), recurrence(A, w), rtol=0, atol=1e-12)


def test_channels_that_keep_all_sum_up_and_channels_that_keep_nothing_see_one_token():
    w = torch.randn(2, 9, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(scan(torch.ones_like(w), w), w.cumsum(1))
    assert torch.equal(scan(torch.zeros_like(w), w), w)


def test_a_scan_of_factors_that_vanish_stays_finite():
    A = torch.full((1, 512, 2), 1e-30)
    w = torch.ones(1, 512, 2)
    assert torch.equal(scan(A, w), torch.ones_like(w))


def test_gradients_of_the_scan_are_those_of_finite_differences():
    generator = torch.Generator().manual_seed(0)
    A = torch.rand(1, 5, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    w = torch.randn(1, 5, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(scan, (A, w))


@pytest.mark.parametrize("write", ["step", "convex"])
def test_gradients_of_every_weight_are_those_of_finite_differences(write):
    model = shaken(StateSpace(StateSpaceConfig(**SMALL, write=write)))
    ids = batch_for(model.config)["input_ids"]
    model(input_ids=ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        flat, at = parameter.detach().view(-1), int(parameter.grad.abs().argmax())
        kept, losses = float(flat[at]), []
        for step in (1e-5, -1e-5):
            flat[at] = kept + step
            losses.append(float(model(input_ids=ids, labels=ids).loss.detach()))
        flat[at] = kept
        assert float(parameter.grad.view(-1)[at]) == pytest.approx((losses[0] - losses[1]) / 2e-5, rel=1e-5), name


def test_what_the_decay_returns_is_all_that_memory_is():
    """Factors of 0 from that one module: every token is read alone, and the order of the others is forgotten."""
    model = shaken(StateSpace(StateSpaceConfig(**SMALL)))
    ids = batch_for(model.config, sequences=1, tokens=7)["input_ids"]
    shapes = []
    for block in model.blocks:
        block.mixer.inner.decay.register_forward_hook(lambda module, given, made: shapes.append(made.shape) or 0 * made)
    alone = torch.cat([model(input_ids=ids[:, t : t + 1]).logits for t in range(7)], 1)
    torch.testing.assert_close(model(input_ids=ids).logits, alone, rtol=0, atol=1e-12)
    assert shapes[-1] == (1, 7, 6, 3)


def test_decays_are_factors_and_steps_start_where_they_are_told_to():
    config = StateSpaceConfig(**SMALL, selective=False, steps=(0.01, 1.0))
    decay, seen = StateSpace(config).blocks[0].mixer.inner.decay, []
    model = StateSpace(config)
    model.blocks[0].mixer.inner.decay.register_forward_hook(lambda module, given, made: seen.append((given[0], made)))
    model(**batch_for(config))
    steps, factors = seen[0]
    torch.testing.assert_close(steps[0, 0, [0, -1]], torch.tensor([0.01, 1.0]), rtol=1e-5, atol=0)
    wanted = torch.exp(-steps[..., None] * torch.arange(1, 4))
    torch.testing.assert_close(factors, wanted, rtol=1e-5, atol=0)
    torch.testing.assert_close(decay(steps), factors)
    assert bool(((factors > 0) & (factors < 1)).all())
