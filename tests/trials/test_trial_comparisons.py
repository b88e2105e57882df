"""The best rate, the widest rate, paired differences, plain recommendations, and a whole trial."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from fullrank.capture import survey, undisturbed
from fullrank.errors import TrialError
from fullrank.trials import (
    RECOMMENDATIONS,
    Course,
    Settings,
    best_rate,
    of_batches,
    of_task,
    paired,
    recommendations,
    task_for,
    train,
    trial,
)
from tiny import bert_config
from trials.small import Bigram, encoder, text
from untouched import changes, everything

# ---------------------------------------------------------------- differences


def test_of_one_seed_the_interval_is_that_of_the_paired_t_test():
    draw = np.random.default_rng(0)
    a, b = draw.normal(2, 1, 20), draw.normal(2, 1, 20)
    found = paired([a.tolist()], [b.tolist()])
    low, high = stats.ttest_rel(a, b).confidence_interval(0.95)
    assert (found.mean, found.low, found.high) == pytest.approx(((a - b).mean(), low, high))
    assert (found.seeds, found.sequences) == (1, 20)


def test_of_one_sequence_the_seeds_are_what_varies():
    a, b = [[1.0], [2.0], [4.0]], [[1.5], [3.5], [4.2]]
    found = paired(a, b)
    low, high = stats.ttest_rel(np.ravel(a), np.ravel(b)).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((low, high))


def test_seeds_and_sequences_both_widen_the_interval():
    draw = np.random.default_rng(1)
    d = draw.normal(0, 1, (3, 1)) + draw.normal(0, 1, (1, 12)) + 0.1 * draw.normal(0, 1, (3, 12))
    found = paired(d.tolist(), np.zeros((3, 12)).tolist())
    of_seeds, of_sequences = d.mean(1).var(ddof=1) / 3, d.mean(0).var(ddof=1) / 12
    assert found.stderr == pytest.approx(math.sqrt(of_seeds + of_sequences))
    freedom = (of_seeds + of_sequences) ** 2 / (of_seeds**2 / 2 + of_sequences**2 / 11)
    half = stats.t.ppf(0.975, int(freedom)) * found.stderr
    assert (found.low, found.high) == pytest.approx((found.mean - half, found.mean + half))


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    draw = np.random.default_rng(2)
    hits = 0
    for _ in range(300):
        d = 0.3 + 0.5 * draw.normal(size=(3, 1)) + draw.normal(size=(1, 16)) + draw.normal(size=(3, 16))
        found = paired(d.tolist(), np.zeros((3, 16)).tolist())
        hits += found.low <= 0.3 <= found.high
    assert hits / 300 > 0.93


def test_an_interval_that_holds_0_shows_no_difference_and_says_so():
    assert not paired([[1.0, 2.0, 3.0]], [[1.1, 1.9, 3.0]]).shown
    assert "no difference shown" in str(paired([[1.0, 2.0, 3.0]], [[1.1, 1.9, 3.0]]))
    found = paired([[1.0, 2.0, 3.0]], [[2.1, 2.9, 4.0]])
    assert found.shown
    assert "no difference" not in str(found)
    assert "no interval" in str(paired([[1.0]], [[2.0]]))
    assert not paired([[1.0]], [[2.0]]).shown


@pytest.mark.parametrize(("one", "other"), [([], []), ([[1.0]], [[1.0, 2.0]]), ([[1.0]], [[1.0], [2.0]]), ([[]], [[]])])
def test_what_is_not_of_the_same_seeds_and_sequences_is_not_paired(one, other):
    with pytest.raises(TrialError, match="paired"):
        paired(one, other)


# ---------------------------------------------------------------- learning rates


class Attempts:
    """Trainings whose loss after n steps is known: best at one rate, diverging from another one on."""

    def __init__(self, best, limit, *, start=3.0):
        self.best, self.limit, self.start, self.steps = best, limit, start, []

    def __call__(self, rate, steps):
        self.steps.append((rate, steps))
        lost = self.start - 2 * (1 - math.exp(-steps / 30)) * math.exp(-(math.log(rate / self.best) ** 2) / 4)
        diverged = 1 if rate > self.limit else None
        return Course(
            (self.start,) * steps, Settings(rate), 0, (lost,) if diverged is None else (), (self.start,), diverged
        )


def test_the_best_rate_is_found_in_fewer_steps_than_trying_all_of_them_and_one_beyond_each_end():
    attempts = Attempts(1e-3, limit=5e-3)
    found = best_rate(attempts, steps=100)
    assert found.best == 1e-3
    assert not found.edge
    assert found.course.final == min(course.final for course in found.courses.values())
    assert sum(steps for _, steps in attempts.steps) < 5 * 100
    assert found.widest == 3e-3
    assert not found.widest_is_edge
    assert found.note == ""


@pytest.mark.parametrize(("best", "reached"), [(1e-5, 1e-4 / 10**0.5), (1.0, 1e-2 * 10**0.5)])
def test_a_best_rate_beyond_the_grid_makes_the_grid_longer_once_and_is_said(best, reached):
    found = best_rate(Attempts(best, limit=9), steps=100)
    assert found.best == pytest.approx(reached)
    assert found.edge
    assert "a better one may lie beyond" in found.note


def test_rates_that_train_up_to_the_end_of_the_grid_are_said_to_reach_it():
    found = best_rate(Attempts(1e-3, limit=9), steps=100)
    assert (found.widest, found.widest_is_edge) == (1e-2, True)
    assert "larger ones may train too" in found.note


def test_where_rates_diverge_late_smaller_ones_are_tried_until_one_does_not():
    class Late(Attempts):
        def __call__(self, rate, steps):
            self.limit = 5e-4 if steps > 50 else 9
            return super().__call__(rate, steps)

    found = best_rate(Late(1e-2, limit=9), steps=100)
    assert found.best == 3e-4
    assert found.widest == 3e-4


def test_where_all_diverge_there_is_no_best_rate():
    found = best_rate(Attempts(1e-3, limit=0), steps=40)
    assert (found.best, found.widest, found.course) == (None, None, None)
    assert "diverged at every rate" in found.note


def test_what_stays_at_chance_trains_at_no_rate():
    found = best_rate(Attempts(1e-3, limit=9, start=3.0), steps=3, chance=2.8)
    assert found.widest is None
    assert found.best is not None


@pytest.mark.parametrize("rates", [(), (1e-3, 1e-3), (0.0,), (math.inf,)])
def test_a_grid_that_is_none_is_refused(rates):
    with pytest.raises(TrialError, match="rates"):
        best_rate(Attempts(1e-3, 1.0), steps=10, rates=rates)


# ---------------------------------------------------------------- recommendations


@pytest.mark.parametrize("one", RECOMMENDATIONS, ids=lambda one: one.name)
def test_a_recommendation_says_what_it_changes_and_changes_that(one):
    base = Settings(1e-3)
    assert one.sentence.endswith(".")
    assert one.formula
    assert one.source
    assert (one.applied_to(base) != base) == (one.embedding is None)
    assert len({other.name for other in RECOMMENDATIONS}) == len(RECOMMENDATIONS)


def test_rates_are_factors_and_the_rest_are_values():
    (third,) = recommendations(["learning-rate/3"])
    assert third.applied_to(Settings(3e-3)).learning_rate == pytest.approx(1e-3)
    (beta,) = recommendations(["adam-beta2"])
    assert beta.applied_to(Settings()).betas == (0.9, 0.95)
    assert recommendations() == RECOMMENDATIONS
    with pytest.raises(TrialError, match="learning-rate/3"):
        recommendations(["pray"])


def test_the_embedding_is_scaled_by_what_the_anatomy_names_and_comes_back():
    from transformers import BertModel

    model = BertModel(bert_config())
    ids = torch.arange(5, 13)[None]
    with undisturbed(model):
        anatomy = survey(model, lambda: model(input_ids=ids))
    words = model.get_input_embeddings().weight.detach().clone()
    before = everything(model)
    for name, factor in (("embedding×√d", 4.0), ("embedding/√d", 0.25)):
        (one,) = recommendations([name])
        with one.edit(model, anatomy):
            assert torch.equal(model.get_input_embeddings().weight, factor * words)
    assert set(changes(before, everything(model))) <= {"versions"}


def test_without_an_embedding_or_with_a_tied_one_it_is_not_scaled():
    from transformers import GPT2Config, GPT2LMHeadModel

    (one,) = recommendations(["embedding×√d"])
    with pytest.raises(TrialError, match="no embedding"):
        one.edit(encoder())
    sizes = {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
    ids = torch.arange(5, 13)[None]
    with undisturbed(model):
        anatomy = survey(model, lambda: model(input_ids=ids))
    with pytest.raises(TrialError, match="scale the logits"):
        one.edit(model, anatomy)


# ---------------------------------------------------------------- a whole trial


def test_a_trial_is_the_best_rates_training_for_every_seed_and_leaves_no_trace():
    model = encoder()
    data = of_task(task_for(model, torch.randn(2, 8, 16)), steps=12, size=4, sequences=8)
    before = everything(model)
    found = trial(model, data, steps=12, seeds=(0, 1), rates=(1e-4, 1e-2))
    assert not changes(before, everything(model))
    assert [course.seed for course in found.courses] == [0, 1]
    assert all(len(course.held_out) == 8 for course in found.courses)
    by_hand = train(
        model, data.training(1), steps=12, learning_rate=found.rate, seed=1, loss=data.objective, held_out=data.held_out
    )
    assert by_hand.held_out == found.courses[1].held_out
    assert found.loss == pytest.approx(np.mean([course.held_out for course in found.courses]))
    assert found.against(found).mean == 0
    other = trial(model, data, steps=12, seeds=(0, 1), rate=1e-4)
    assert other.rates is None
    expected = np.subtract([c.held_out for c in other.courses], [c.held_out for c in found.courses]).mean()
    assert other.against(found).mean == pytest.approx(expected)


def test_a_trial_that_diverges_has_no_difference_and_did_not_train():
    data = of_batches(text(8), causal=True)
    lost = trial(Bigram(), data, steps=30, settings=Settings(optimiser="sgd", clip=None), rate=1e6)
    fine = trial(Bigram(), data, steps=3, rate=1e-3)
    assert lost.against(fine) is None
    assert lost.loss == math.inf
    assert not lost.trained


def test_users_batches_are_split_and_every_seed_has_an_order_of_its_own():
    batches = text(8)
    data = of_batches(iter(batches), causal=True)
    assert [len(part) for part in (data.training(0), data.choosing, data.held_out)] == [4, 2, 2]
    assert all(a is b for a, b in zip(data.training(0), batches, strict=False))
    first, again, other = ([id(one) for one in data.training(seed)] for seed in (1, 1, 5))
    assert first == again
    assert sorted(first) == sorted(map(id, batches[:4]))
    assert other != first
    assert data.notes == ()


@pytest.mark.parametrize(("count", "said"), [(1, "trained on"), (2, "few batches"), (3, "few batches")])
def test_few_batches_are_used_and_it_is_said(count, said):
    data = of_batches(text(count), causal=True)
    assert data.training(0)
    assert data.held_out
    assert said in data.notes[0]


def test_no_batches_are_refused():
    with pytest.raises(TrialError, match="empty"):
        of_batches([])


def test_a_short_training_of_the_search_is_the_beginning_of_a_whole_one():
    model = Bigram()
    data = of_batches(text(8), causal=True)
    found = trial(model, data, steps=16, settings=Settings(warm_up=0.5), rates=(1e-4, 1e-3, 1e-2), widest=False)
    rate, short = next((rate, course) for rate, course in found.rates.courses.items() if course.steps < 16)
    whole = train(model, data.training(0), steps=16, learning_rate=rate, warm_up=8, loss=data.objective)
    assert short.steps == 4
    assert short.losses == whole.losses[:4]
