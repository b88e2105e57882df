"""What sequences are judged: those with a target, one by one or of one forward, as many as are enough."""

import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from fullrank.errors import TrialError
from fullrank.trials import Example, OwnLoss, TargetLoss, YourLoss, judged, of_batches, of_task, task_for, train, trial
from fullrank.trials.data import JUDGED
from fullrank.trials.images import images
from fullrank.trials.sequences import cut, have_targets, labels_in, parts_of, run, sequences_in
from tiny import bert_config
from trials.small import Bigram, encoder, text


class Labelled(Bigram):
    """Returns its own loss: of the label at the same place, or, as models that read on, of the next one."""

    def __init__(self, *, shift=0, extra=0.0, smoothing=0.0):
        super().__init__()
        self.shift, self.extra, self.smoothing, self.calls = shift, extra, smoothing, 0

    def forward(self, input_ids, labels, attention_mask=None):
        self.calls += 1
        logits = super().forward(input_ids)
        said, targets = logits[:, : logits.shape[1] - self.shift], labels[:, self.shift :]
        loss = functional.cross_entropy(said.flatten(0, 1), targets.flatten(), label_smoothing=self.smoothing)
        return {"loss": loss + self.extra, "logits": logits}


def labelled(count=2, *, seed=0, size=4, tokens=8):
    """Batches whose second sequence has no label, and whose third has one at the first place alone."""
    made = []
    for ids in text(count, seed=seed, size=size, tokens=tokens):
        labels = ids.clone()
        labels[0, :3] = -100
        labels[1] = -100
        labels[2, 1:] = -100
        made.append({"input_ids": ids, "labels": labels})
    return made


def one_by_one(model, batch):
    """Each sequence called alone."""
    found = []
    with torch.no_grad():
        for at in range(len(batch["input_ids"])):
            loss = model(**{name: value[at : at + 1] for name, value in batch.items()})
            found.append(float(loss["loss"] if isinstance(loss, dict) else loss.loss))
    return found


# ---------------------------------------------------------------- targets


@pytest.mark.parametrize(
    ("batch", "there"),
    [
        ({"labels": torch.tensor([[1, -100], [-100, -100], [-100, 2]])}, [False, False, True]),
        ({"labels": torch.tensor([[1], [-100]])}, [True, False]),
        ({"labels": torch.tensor([3, -100])}, [True, False]),
        ({"labels": torch.rand(2, 3)}, [True, True]),
        ({"input_ids": torch.ones(2, 3), "attention_mask": torch.tensor([[1, 1, 0], [0, 1, 0]])}, [True, False]),
        ((torch.ones(2, 3), torch.tensor([-100, 1])), [False, True]),
        ([torch.ones(2, 3), torch.tensor([-100, 1])], [False, True]),
        (torch.ones(2, 3), [True, True]),
        ({"words": ["a", "b"]}, [True]),
    ],
)
def test_which_sequences_have_a_target_is_seen_from_the_batch(batch, there):
    assert have_targets(batch).tolist() == there


@pytest.mark.parametrize("shift", [0, 1])
def test_sequences_without_a_target_are_left_out_and_nothing_diverges(shift):
    model = Labelled(shift=shift).eval()
    batches = labelled()
    course = train(model, batches, steps=3, learning_rate=1e-4, held_out=batches)
    expected = [loss for batch in batches for loss in one_by_one(model, batch) if not math.isnan(loss)]
    assert len(expected) == (4 if shift else 6)
    assert course.started == pytest.approx(expected, rel=1e-6)
    assert course.diverged is None
    assert len(course.held_out) == len(expected)
    assert math.isfinite(course.final)


def test_sequences_that_may_have_no_target_are_counted_in_a_note():
    assert of_batches(labelled(8)).notes == (
        "4 held-out sequences may have no target, and are left out where they give no loss.",
    )
    assert of_batches([{"input_ids": ids, "labels": ids} for ids in text(8)]).notes == ()


def test_a_sequence_of_one_real_token_is_left_out_of_next_tokens():
    model, (ids,) = Bigram().eval(), text(1)
    mask = torch.ones_like(ids)
    mask[2, 1:] = 0
    batch = {"input_ids": ids, "attention_mask": mask}

    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, input_ids, attention_mask):
            return self.inner(input_ids)

    course = train(Masked(), [batch], steps=2, causal=True, held_out=[batch])
    assert len(course.started) == len(course.held_out) == 3
    assert course.diverged is None
    by_hand = functional.cross_entropy(model(ids)[0, :-1], ids[0, 1:])
    assert course.started[0] == pytest.approx(by_hand.item())


def test_targets_that_are_missing_here_and_there_leave_the_mean_of_the_others():
    model = encoder()
    task = task_for(model, torch.randn(2, 8, 16))
    (full,) = task.batches(0, 1, 3)
    some = full.targets.clone()
    some[0, ::2] = -100
    some[1] = -100
    whole, left = (
        judged(model, [Example(full.batch, targets)], loss=task.objective) for targets in (full.targets, some)
    )
    assert len(left) == 2
    assert left[1] == whole[2]
    assert left[0] != whole[0]
    course = train(model, [Example(full.batch, some)], steps=2, loss=task.objective, held_out=[full])
    assert course.diverged is None


def test_batches_without_a_target_are_passed_by_in_training():
    model, (batch, other) = Labelled(), labelled()
    nothing = {**batch, "labels": torch.full_like(batch["labels"], -100)}
    mixed = train(model, [batch, nothing, other], steps=3)
    assert mixed.diverged is None
    assert mixed.losses == train(model, [batch, other, batch], steps=3).losses
    with pytest.raises(TrialError, match="no batch has a target"):
        train(model, [nothing], steps=1)
    with pytest.raises(TrialError, match="no held-out sequence"):
        of_batches([batch, batch, batch, nothing])


def test_a_loss_that_is_not_a_number_where_there_are_targets_is_divergence():
    class Breaks(Labelled):
        def forward(self, input_ids, labels):
            found = super().forward(input_ids, labels)
            broken = torch.nan if self.calls > 3 else 1.0
            return {name: value * broken for name, value in found.items()}

    batches = [{"input_ids": ids, "labels": ids} for ids in text(2)]
    course = train(Breaks(), batches, steps=2, held_out=batches[:1])  # judged after the fourth call
    assert (course.diverged, course.held_out) == (2, ())
    assert course.final == math.inf
    assert train(Breaks(), batches, steps=9).diverged == 3


def test_a_function_of_ones_own_that_gives_no_number_for_no_target_does_not_diverge():
    x, y = torch.randn(4, 8), torch.tensor([0, -100, 1, 2])
    model = nn.Linear(8, 3)
    course = train(
        model, [(x, y)], steps=2, loss=lambda m, b: functional.cross_entropy(m(b[0]), b[1]), held_out=[(x, y)]
    )
    assert len(course.held_out) == 3
    assert course.diverged is None


# ---------------------------------------------------------------- one forward or one for each


@pytest.mark.parametrize("shift", [0, 1])
def test_where_the_loss_is_that_of_the_logits_there_is_one_forward_and_otherwise_one_for_each(shift):
    for options, calls in (({}, 1), ({"extra": 0.1}, 5), ({"smoothing": 0.1}, 5)):
        model = Labelled(shift=shift, **options).eval()
        (batch,) = labelled(1)
        with torch.no_grad():
            found = OwnLoss().each(model, batch)
        assert model.calls == calls
        expected = [loss for loss in one_by_one(model, batch) if not math.isnan(loss)]
        assert found.tolist() == pytest.approx(expected, rel=1e-6)


def of_transformers(kind, config, **options):
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, config)(**options) if isinstance(config, str) else config
    return getattr(transformers, kind)(config).eval()


GPT2 = {"vocab_size": 40, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32, "bos_token_id": 0}
T5 = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}


@pytest.mark.parametrize(
    ("make", "classes"),
    [
        (lambda: of_transformers("GPT2LMHeadModel", "GPT2Config", **GPT2, eos_token_id=0), None),
        (lambda: of_transformers("BertForMaskedLM", bert_config(vocab_size=40)), None),
        (lambda: of_transformers("T5ForConditionalGeneration", "T5Config", **T5, decoder_start_token_id=0), None),
        (lambda: of_transformers("BertForSequenceClassification", bert_config(vocab_size=40, num_labels=3)), 3),
    ],
    ids=["causal", "masked", "encoder-decoder", "classes"],
)
def test_losses_of_one_forward_are_those_of_each_sequence_alone(make, classes):
    model, calls = make(), []
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 40, (4, 9), generator=draw)
    labels = ids.masked_fill(torch.rand(ids.shape, generator=draw) < 0.5, -100)
    labels[1] = -100
    batch = {"input_ids": ids, "labels": labels if classes is None else torch.tensor([0, 2, 1, 2])}
    expected = [loss for loss in one_by_one(model, batch) if not math.isnan(loss)]
    model.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        found = OwnLoss().each(model, batch)
    assert len(calls) == 1
    assert len(expected) == (3 if classes is None else 4)
    assert found.tolist() == pytest.approx(expected, rel=1e-5)


def test_a_trial_judges_the_start_once_and_trains_the_best_rate_once():
    model, calls = Bigram(), []

    def loss(model, batch):
        calls.append((model.training, len(batch)))
        return functional.cross_entropy(model(batch)[:, :-1].flatten(0, 1), batch[:, 1:].flatten())

    data = of_batches(text(8), loss=loss)
    made = trial(model, data, steps=4, seeds=(0, 1), rates=(1e-4, 1e-3), widest=False)
    full = sum(course.steps == 4 for course in made.rates.courses.values())
    assert [len(data.choosing), len(data.held_out)] == [2, 2]
    # the start of both parts; both after every whole training of the search; the one held out after the second seed's
    assert sum(not training for training, _ in calls) == 16 + 16 * full + 8
    assert sum(training for training, _ in calls) == 4 * full + 4
    assert made.courses[0].started == made.courses[1].started == judged(model, data.held_out, loss=loss)
    alone = train(model, data.training(0), steps=4, learning_rate=made.rate, loss=loss, held_out=data.held_out)
    assert made.courses[0].held_out == alone.held_out
    assert made.rates.course.started == judged(model, data.choosing, loss=loss)
    chosen = train(model, data.training(0), steps=4, learning_rate=made.rate, loss=loss, held_out=data.choosing)
    assert made.rates.course.held_out == chosen.held_out


# ---------------------------------------------------------------- how many


def test_no_more_than_enough_are_judged():
    data = of_batches(text(8, size=200), causal=True)
    assert [sum(map(len, part)) for part in (data.choosing, data.held_out)] == [JUDGED, JUDGED]
    assert [len(one) for one in data.held_out] == [200, 56]
    (one,) = of_batches(text(1, size=300), causal=True).held_out
    assert len(one) == JUDGED


@pytest.mark.parametrize(("size", "seeds", "read"), [(128, 1, 5 + 4), (128, 3, 15 + 4), (64, 2, 10 + 8), (512, 1, 7)])
def test_no_more_batches_are_read_than_are_used(size, seeds, read):
    seen = []

    def endless():
        for number in itertools.count():
            seen.append(number)
            yield torch.zeros((size, 2), dtype=torch.int64)

    data = of_batches(endless(), causal=True, steps=5, seeds=seeds)
    assert len(seen) == read
    assert len(data.training(0)) >= 5 * seeds
    assert sum(map(len, data.held_out)) <= JUDGED
    seen.clear()
    of_batches(endless(), causal=True, most=12)
    assert len(seen) == 12


def test_a_short_list_is_split_as_ever_whatever_the_steps():
    batches = text(8)
    one, other = of_batches(batches, causal=True), of_batches(batches, causal=True, steps=3)
    assert [id(b) for b in one.held_out] == [id(b) for b in other.held_out] == [id(b) for b in batches[6:]]
    assert len(other.training(0)) == 4


# ---------------------------------------------------------------- lists


def test_a_list_is_a_tuple_of_arguments_and_holds_as_many_sequences_as_its_tensors():
    x, y = torch.randn(12, 8), torch.randint(3, (12,))
    loader = DataLoader(TensorDataset(x, y), batch_size=3)
    model = nn.Linear(8, 3)
    data = of_batches(loader, loss=lambda m, b: functional.cross_entropy(m(b[0]), b[1]))
    found = trial(model, data, steps=2, rate=1e-3)
    assert found.against(found).sequences == 3
    held = functional.cross_entropy(model(x[9:]), y[9:], reduction="none")
    assert found.courses[0].started == pytest.approx(held.tolist())
    assert run(torch.add, [x, x]).equal(run(torch.add, (x, x)))
    assert [type(part) for part in parts_of([x, y])] == [list] * 12
    assert cut([x, y], 5)[1].equal(y[:5])
    assert sequences_in([x, y[:4]]) == 1


def test_a_list_of_token_ids_has_next_tokens():
    loader = DataLoader(TensorDataset(torch.cat(text(4))), batch_size=4)
    data = of_batches(loader, causal=True)
    assert len(judged(Bigram(), data.held_out, loss=data.objective)) == 4


def test_labels_are_those_of_a_mapping_where_there_are_one_and_no_others():
    labels = torch.ones(2, 3, dtype=torch.int64)
    assert labels_in({"input_ids": labels, "labels": labels}) is labels
    assert labels_in({"labels": labels, "next_sentence_label": labels[:, 0]}) is None
    assert labels_in({"labels": labels.float()}) is None
    assert labels_in((labels, labels)) is None


# ---------------------------------------------------------------- built-in tasks


def test_images_for_training_choosing_and_held_out_are_three_sets_and_none_comes_twice():
    def drawn(part, count, seed=0):
        X, y = images(seed, count, shape=(1, 8, 8), classes=10, part=part)
        return [tuple(x.flatten().tolist()) for x in X], y

    parts = {part: drawn(part, 160) for part in ("choosing", "held out")}
    parts["training"] = drawn("training", 1200)
    sets = {part: set(seen) for part, (seen, _) in parts.items()}
    assert [len(sets[part]) for part in parts] == [160, 160, 1200]
    for one, other in itertools.combinations(sets.values(), 2):
        assert not one & other
    for _, y in parts.values():
        assert y.bincount().tolist() == [len(y) // 10] * 10
    assert drawn("training", 160)[0] == parts["training"][0][:160]
    assert drawn("training", 160, seed=1)[0] != parts["training"][0][:160]


def test_a_tasks_choosing_and_held_out_images_are_others_however_large_a_batch():
    from fullrank.zoo import Transformer, TransformerConfig

    model = Transformer(TransformerConfig(depth=1, width=16, heads=2, kind="vision", image=16))
    task = task_for(model, {"pixel_values": torch.randn(2, 3, 16, 16)})
    for size in (16, 128):
        data = of_task(task, steps=2, size=size)
        seen = [one for part in (data.choosing, data.held_out) for batch in part for one in batch.batch["pixel_values"]]
        assert len(seen) == len({tuple(one.flatten().tolist()) for one in seen}) == 128
        assert [len(batch.targets) for batch in data.training(0)] == [size] * 2


@pytest.mark.parametrize("wrong", [{"size": 0}, {"steps": 0}, {"sequences": 0}, {"size": 1.5}])
def test_numbers_of_sequences_below_1_are_one_sentence(wrong):
    task = task_for(encoder(), torch.randn(2, 8, 16))
    with pytest.raises(TrialError, match=f"{next(iter(wrong))}=.*at least 1"):
        of_task(task, **({"steps": 2} | wrong))


def test_a_model_that_needs_other_arguments_is_told_to_bring_data():
    class Two(Bigram):
        def forward(self, input_ids, speaker):
            return super().forward(input_ids) + speaker

    ids = torch.ones(2, 8, dtype=torch.int64)
    with pytest.raises(TrialError, match=r"Two cannot be called.*input_ids alone.*'speaker'.*pass data=") as refused:
        task_for(Two(), {"input_ids": ids, "speaker": torch.ones(2, 8, 1)})
    assert "\n" not in str(refused.value)


def test_objectives_of_ones_own_judge_whatever_they_are_given():
    assert YourLoss(lambda model, batch: model(batch)).judges(object())
    assert not TargetLoss().judges(Example(torch.ones(1, 2), torch.tensor([[-100, -100]])))
