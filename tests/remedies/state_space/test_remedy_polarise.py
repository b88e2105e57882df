"""Polarised channels against a recurrence token by token, and what they are for: less forgetting, less smoothing."""

import pytest
import torch
from torch.nn import functional

import fullrank
from fullrank.errors import RemedyError
from fullrank.theory.ssm_oversmoothing import channel_decay
from fullrank.zoo import StateSpace, StateSpaceConfig, Transformer, TransformerConfig
from golden import golden
from untouched import changes, everything

IDS = {"input_ids": torch.arange(24).reshape(2, 12) % 11}


def small(**options):
    config = {"depth": 2, "width": 8, "states": 4, "vocabulary": 11} | options
    return StateSpace(StateSpaceConfig(**config), seed=0).double()


@pytest.mark.parametrize(("ones", "zeros"), [(1, 1), (2, 1), (0, 3), (4, 0)])
def test_the_state_is_that_of_a_recurrence_with_decays_one_and_zero(ones, zeros):
    model = small()
    X = torch.randn(2, 12, 8, generator=torch.Generator().manual_seed(1)).double()
    mixer = model.blocks[0].mixer.inner
    with fullrank.repair(model, "polarise", ones=ones, zeros=zeros, batch=IDS), torch.no_grad():
        found = mixer(X)
    with torch.no_grad():
        u, gate = mixer.input(X), functional.silu(mixer.gate(X))
        steps = functional.softplus(mixer.step(u))
        for b in range(2):
            h = torch.zeros(8, 4, dtype=torch.float64)
            for t in range(12):
                B, C = mixer.write(u[b, t]), mixer.read(u[b, t])
                for n in range(4):
                    decay = torch.exp(-steps[b, t] * mixer.decay.log_rate[:, n].exp())
                    decay = 1.0 if n < ones else 0.0 if n >= 4 - zeros else decay
                    h[:, n] = decay * h[:, n] + steps[b, t] * B[n] * u[b, t]
                y = mixer.output((h @ C) * gate[b, t])
                torch.testing.assert_close(found[b, t], y, rtol=0, atol=1e-12)


def test_a_zero_channel_is_zero_whatever_the_step_unlike_that_of_the_papers_code():
    model = small()
    steps = torch.tensor(golden_steps := [1e-3, 1e-2, 1e-1]).double()
    entry = golden("ssm-zero-channel")
    assert channel_decay(100.0, step=golden_steps) == pytest.approx(entry["expected"], rel=entry["tolerance"])
    with fullrank.repair(model, "polarise", batch=IDS), torch.no_grad():
        A_bar = model.blocks[0].mixer.inner.decay(steps[:, None].expand(-1, 8))
    assert (A_bar[..., 0] == 1).all()
    assert (A_bar[..., -1] == 0).all()
    assert ((A_bar[..., 1:-1] > 0) & (A_bar[..., 1:-1] < 1)).all()


def test_the_first_token_reaches_the_last_where_it_was_forgotten():
    """∂y_T/∂x_1 of one block decays with T; with a channel that keeps all it does not."""

    def reached(model, T):
        X = torch.randn(1, T, 8, generator=torch.Generator().manual_seed(2)).double().requires_grad_()
        model.blocks[0].mixer.inner(X)[0, -1].sum().backward()
        return float(X.grad[0, 0].norm())

    plain, polarised = small(steps=(0.3, 0.5)), small(steps=(0.3, 0.5))
    fullrank.repair(polarised, "polarise", zeros=0, batch=IDS)
    ratios = {T: reached(polarised, T) / reached(plain, T) for T in (4, 16, 64)}
    assert ratios[16] > 3 * ratios[4]
    assert ratios[64] > 1e5 * ratios[16]


def test_channels_that_keep_nothing_leave_deep_stacks_less_smooth():
    """Without a skip, slow channels average over tokens in every block; zero channels hand tokens on as they are."""

    def alike(model):
        X = torch.randn(1, 64, 8, generator=torch.Generator().manual_seed(2)).double()
        with torch.no_grad():
            for block in model.blocks:
                X = functional.normalize(block(X), dim=-1)
        return float((X[0, 32:] @ X[0, 32:].mT).abs().mean())

    options = {"depth": 8, "norm": "none", "placement": "none", "skip_scale": 0.0, "gate": False}
    options |= {"write": "convex", "selective": False, "steps": (0.005, 0.01), "final_norm": False}
    model = small(**options)
    before = alike(model)
    with fullrank.repair(model, "polarise", ones=0, zeros=2, batch=IDS):
        after = alike(model)
    assert after < before - 0.1


def test_what_it_does_not_fit_is_refused():
    transformer = Transformer(TransformerConfig(depth=1))
    for model, parameters, words in (
        (transformer, {}, "a Transformer has none that it knows"),
        (small(), {"ones": 3, "zeros": 2}, "more than the 4 channels"),
        (small(), {"ones": 0, "zeros": 0}, "change nothing"),
        (small(write="convex"), {}, "would be written nothing"),
    ):
        state = everything(model)
        with pytest.raises(RemedyError, match=words):
            fullrank.repair(model, "polarise", batch=IDS, **parameters)
        assert changes(state, everything(model)) == []
