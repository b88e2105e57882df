"""Training a lent model: as a loop written by hand, and nothing of it stays."""

import copy
import math
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from fullrank import edit
from fullrank.errors import TrialError
from fullrank.trials import Settings, judged, task_for, train
from fullrank.trials.masters import Masters
from trials.small import Bigram, encoder, text
from untouched import changes, everything


def by_hand(model, batches, *, steps, seed, lr, warm_up, betas, eps, z_loss, clip, fused=True):
    """The same training on a copy, in as few words as torch allows."""
    model = copy.deepcopy(model).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=lr, betas=betas, eps=eps, weight_decay=0.0, fused=fused)
    losses = []
    torch.manual_seed(seed)
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / warm_up)
        ids = batches[step % len(batches)]
        logits = model(ids)[:, :-1]
        loss = functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        losses.append(loss.item())
        optimiser.zero_grad()
        (loss + z_loss * logits.logsumexp(-1).square().mean()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimiser.step()
    model.eval()
    with torch.no_grad():
        judged = [functional.cross_entropy(model(one[None])[0, :-1].double(), one[1:]).item() for one in batches[0]]
    return losses, judged


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_training_is_a_loop_written_by_hand_bit_for_bit(dropout):
    model, batches = Bigram(dropout=dropout), text(3)
    settings = {"warm_up": 4, "betas": (0.8, 0.95), "eps": 1e-7, "z_loss": 0.01, "clip": 0.5}
    with torch.random.fork_rng(devices=[]):
        losses, judged = by_hand(model, batches, steps=7, seed=5, lr=0.01, **settings)
    course = train(model, batches, steps=7, seed=5, learning_rate=0.01, causal=True, held_out=batches[:1], **settings)
    assert list(course.losses) == losses
    assert course.held_out == pytest.approx(judged, rel=1e-6)
    assert course.steps == 7
    assert course.diverged is None
    assert course.seconds > 0
    assert course.final == pytest.approx(sum(judged) / len(judged))


def test_the_model_and_the_process_come_back_bit_for_bit():
    model = Bigram(dropout=0.2)
    model.norm.eval()
    model.embed.weight.grad = torch.ones_like(model.embed.weight)
    model.out.bias.requires_grad_(False)
    saved = model.out(torch.ones(1, 8)).sum()  # a graph that still holds the weights
    before, python, numpy = everything(model), random.getstate(), np.random.get_state()[1].copy()
    course = train(model, text(3), steps=5, learning_rate=0.1, causal=True, held_out=text(1))
    assert course.final != course.start
    assert not changes(before, everything(model))
    assert random.getstate() == python
    assert (np.random.get_state()[1] == numpy).all()
    saved.backward()
    assert torch.equal(model.out.weight.grad, torch.ones(20, 8))


def test_the_model_comes_back_when_a_training_fails():
    model, before = Bigram(), None
    calls = []

    def fails(model, batch):
        calls.append(batch)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return model(batch).square().mean()

    before = everything(model)
    with pytest.raises(KeyboardInterrupt):
        train(model, text(3), steps=5, learning_rate=0.1, loss=fails)
    assert not changes(before, everything(model))


def test_the_same_seed_gives_the_same_course_and_another_one_another():
    model, options = Bigram(dropout=0.5), {"steps": 6, "causal": True, "held_out": text(1)}
    one = train(model, text(4), seed=1, **options)
    torch.rand(3)
    again, other = train(model, text(4), seed=1, **options), train(model, text(4), seed=2, **options)
    assert (one.losses, one.held_out) == (again.losses, again.held_out)
    assert one.losses != other.losses


def test_a_penalty_is_trained_on_and_not_counted():
    model = Bigram()
    plain = train(model, text(2), steps=3, learning_rate=0.01, causal=True)
    called = []

    def extra():
        called.append(model.training)
        return 10 * model.out.weight.square().sum()

    held = train(model, text(2), steps=3, learning_rate=0.01, causal=True, extra_loss=extra)
    assert called == [True] * 3
    assert held.losses[0] == plain.losses[0]
    assert held.losses[1:] != plain.losses[1:]


def test_edits_in_force_are_trained_and_stay():
    model = encoder()
    task = task_for(model, torch.randn(2, 8, 16))
    data = task.batches(0, 2, 4)
    plain = train(model, data, steps=2, loss=task.objective)
    with edit.replace_weight(model, "layers.0.linear1.weight", 0.0):
        before = everything(model)
        edited = train(model, data, steps=2, loss=task.objective)
        assert not changes(before, everything(model))
    assert edited.losses != plain.losses
    assert train(model, data, steps=2, loss=task.objective).losses == plain.losses  # the readout is drawn anew too


def test_a_training_that_diverges_says_at_which_step():
    course = train(Bigram(), text(3), steps=50, learning_rate=1e6, optimiser="sgd", causal=True, held_out=text(1))
    assert course.diverged is not None
    assert course.diverged == course.steps - 1
    assert course.final == math.inf
    assert not course.trains()


def test_warm_up_is_a_number_of_steps_or_a_share_of_them():
    rates = [Settings(1.0, warm_up=4).rate(step, 40) for step in range(5)]
    assert rates == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert [Settings(1.0, warm_up=0.1).rate(step, 40) for step in range(5)] == rates
    assert Settings(1.0).rate(0, 40) == 1.0


def test_labels_bring_the_models_own_loss_and_each_sequence_its_own():
    class Labelled(Bigram):
        def forward(self, input_ids, labels):
            logits = super().forward(input_ids)
            return {"loss": functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}

    model, ids = Labelled(), text(2)
    batches = [{"input_ids": one, "labels": one} for one in ids]
    course = train(model, batches, steps=1, held_out=batches[:1], z_loss=0.1)
    model.eval()
    each = [model(input_ids=one[None], labels=one[None])["loss"].item() for one in ids[0]]
    assert course.started == pytest.approx(each)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"steps": 0}, "steps=0"),
        ({"learning_rate": -1.0}, "learning_rate"),
        ({"optimiser": "lion"}, "optimiser"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"causal": False}, "labels"),
        ({"loss": lambda model, batch: 3.0}, "a float"),
        ({"loss": lambda model, batch: model(batch).square().mean(), "z_loss": 1.0}, "z_loss"),
        ({"batches": []}, "empty"),
    ],
)
def test_what_cannot_be_trained_is_one_sentence_and_the_model_untouched(wrong, said):
    model = Bigram()
    before = everything(model)
    options = {"batches": text(2), "steps": 2, "causal": True} | wrong
    with pytest.raises(TrialError, match=said) as refused:
        train(model, options.pop("batches"), **options)
    assert "\n" not in str(refused.value)
    assert not changes(before, everything(model))


def test_a_frozen_model_has_nothing_to_train():
    with pytest.raises(TrialError, match="nothing to train"):
        train(Bigram().requires_grad_(False), text(2), steps=2, causal=True)


# ---------------------------------------------------------------- half precision


def half_by_hand(model, batches, *, steps, lr, optimiser):
    """Float32 weights beside a half-precision model, the whole model rounded from them before every step."""
    model = copy.deepcopy(model).train()
    exact = {name: p.detach().clone().float() for name, p in model.named_parameters()}
    first = {name: torch.zeros_like(p) for name, p in exact.items()}
    second = {name: torch.zeros_like(p) for name, p in exact.items()}
    losses = []
    for step in range(steps):
        for name, p in model.named_parameters():
            p.data = exact[name].to(p.dtype)
        ids = batches[step % len(batches)]
        loss = functional.cross_entropy(model(ids)[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
        losses.append(loss.item())
        grads = torch.autograd.grad(loss, list(model.parameters()))
        for name, grad in zip(exact, grads, strict=True):
            g = grad.float()
            if optimiser == "sgd":
                first[name] = 0.9 * first[name] + g
                exact[name] = exact[name] - lr * first[name]
                continue
            first[name] = 0.9 * first[name] + 0.1 * g
            second[name] = 0.999 * second[name] + 0.001 * g**2
            m, v = first[name] / (1 - 0.9 ** (step + 1)), second[name] / (1 - 0.999 ** (step + 1))
            exact[name] = exact[name] - lr * m / (v.sqrt() + 1e-8)
    return losses


@pytest.mark.parametrize("optimiser", ["adamw", "sgd"])
def test_half_precision_is_trained_through_float32_copies_as_by_hand_and_comes_back(optimiser):
    model = Bigram().to(torch.bfloat16)
    batches, options = text(3), {"steps": 40, "optimiser": optimiser}
    before = everything(model)
    course = train(model, batches, learning_rate=1e-3, clip=None, causal=True, held_out=batches[:1], **options)
    assert not changes(before, everything(model))
    expected = half_by_hand(model, batches, lr=1e-3, **options)
    assert course.losses == pytest.approx(expected, rel=2e-3)  # a rounding may fall to the other side


def test_a_half_precision_gain_of_1_moves_by_steps_smaller_than_its_spacing():
    class Gain(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))

        def forward(self, x):
            return x * self.gain

    seen = []

    def loss(model, batch):
        seen.append(model.gain.detach().clone())
        return model(batch).float().sum()

    plain = torch.ones(4, dtype=torch.bfloat16)
    for _ in range(29):
        plain = plain - 1e-3
    assert torch.equal(plain, torch.ones_like(plain))  # what is lost without copies
    train(Gain(), [torch.ones(2, 4, dtype=torch.bfloat16)], steps=30, learning_rate=1e-3, loss=loss)
    assert seen[-1].float().tolist() == pytest.approx([1 - 29e-3] * 4, abs=2**-9)


def test_copies_of_half_precision_leave_single_precision_as_it_is():
    weights = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2, dtype=torch.float16))]
    masters = Masters.of(weights)
    assert masters.held[0] is weights[0]
    assert masters.held[1].dtype == torch.float32
    weights[0].grad, weights[1].grad = torch.full((2,), 3.0), torch.full((2,), 0.5, dtype=torch.float16)
    masters.take_gradients()
    assert weights[0].grad.tolist() == [3.0, 3.0]
    assert weights[1].grad is None
    assert masters.held[1].grad.tolist() == [0.5, 0.5]
    with torch.no_grad():
        masters.held[1].sub_(1e-5)
    masters.give_values()
    assert weights[1].tolist() == [1.0, 1.0]
    assert masters.held[1].tolist() == pytest.approx([1 - 1e-5] * 2, abs=1e-7)


# ---------------------------------------------------------------- what has been judged before


def test_what_was_lost_before_may_be_given_and_is_not_computed_again():
    model, calls = Bigram(), []

    def loss(model, batch):
        calls.append(model.training)
        return functional.cross_entropy(model(batch)[:, :-1].flatten(0, 1), batch[:, 1:].flatten())

    held = text(2, seed=3)
    before = everything(model)
    known = judged(model, held, loss=loss)
    assert not changes(before, everything(model))
    assert len(known) == 8
    calls.clear()
    full = train(model, text(2), steps=3, loss=loss, held_out=held)
    assert calls.count(False) == 16
    calls.clear()
    assert train(model, text(2), steps=3, loss=loss, held_out=held, started=known).held_out == full.held_out
    assert calls.count(False) == 8
    assert full.started == known
    assert judged(model, ()) == ()


def test_updates_in_one_kernel_are_those_of_torchs_plain_optimiser():
    model, batches = Bigram(), text(3)
    settings = {"warm_up": 4, "betas": (0.8, 0.95), "eps": 1e-7, "z_loss": 0.01, "clip": 0.5}
    with torch.random.fork_rng(devices=[]):
        losses, _ = by_hand(model, batches, steps=12, seed=5, lr=0.01, fused=False, **settings)
    course = train(model, batches, steps=12, seed=5, learning_rate=0.01, causal=True, **settings)
    assert course.losses == pytest.approx(losses, rel=1e-5)
