"""Built-in tasks: known levels, the same batches for a seed, and something to learn for every kind of model."""

import math
from itertools import product

import pytest
import torch
from torch import nn

from fullrank.errors import TrialError
from fullrank.trials import task_for, train
from fullrank.trials.images import images, is_of_digits
from fullrank.trials.language import Language
from fullrank.zoo import StateSpace, StateSpaceConfig, Transformer, TransformerConfig
from tiny import bert_config
from trials.small import Bigram, encoder
from untouched import changes, everything

IDS = torch.arange(5, 17)[None].repeat(2, 1)


def of_llama(**options):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**({"vocab_size": 60} | sizes | options)))


def of_bert(kind, **options):
    import transformers

    torch.manual_seed(0)
    return getattr(transformers, kind)(bert_config(**options))


def of_zoo(**options):
    return Transformer(TransformerConfig(depth=2, width=16, heads=2, **options))


def naive_levels(language, weights):
    """Entropies from the definition, symbol by symbol."""
    K = language.symbols
    pi, sigma = (p.tolist() for p in language.permutations)
    joint = {}
    for (a, b), y in product(weights, range(K)):
        chance = (1 - language.last - language.before) / K
        chance += language.last * (pi[b] == y) + language.before * (sigma[a] == y)
        joint[a, b, y] = weights[a, b] * chance
    own, last = {}, {}
    for (_, b, y), p in joint.items():
        own[b, y] = own.get((b, y), 0) + p
        last[b] = last.get(b, 0) + p
    both = -sum(p * math.log(p / weights[a, b]) for (a, b, _), p in joint.items())
    return -sum(p * math.log(p / last[b]) for (b, _), p in own.items()), both


@pytest.mark.parametrize("seed", [0, 1])
def test_the_levels_of_riddles_are_the_entropies(seed):
    language = Language(4, 0.5, 0.3, seed)
    own, both = naive_levels(language, {(a, b): 1 / 16 for a in range(4) for b in range(4)})
    assert language.of_riddles.own == pytest.approx(own)
    assert language.of_riddles.both == pytest.approx(both)
    assert language.of_riddles.chance == math.log(4)


def test_the_levels_of_text_are_those_of_text_that_was_drawn():
    language = Language(4, 0.3, 0.6)
    text = language.text(400, 500, torch.Generator().manual_seed(0))[:, 50:]
    a, b = text[:, :-1].flatten(), text[:, 1:].flatten()
    counts = torch.bincount(4 * a + b, minlength=16).double()
    seen = {(int(i) // 4, int(i) % 4): float(counts[i] / counts.sum()) for i in range(16)}
    own, both = naive_levels(language, seen)
    assert language.of_text.own == pytest.approx(own, abs=0.01)
    assert language.of_text.both == pytest.approx(both, abs=0.01)
    assert torch.bincount(text.flatten(), minlength=4).double().div(text.numel()).sub(0.25).abs().max() < 0.01


def test_batches_are_the_same_for_a_seed_and_others_are_held_out():
    task = task_for(encoder(), torch.randn(2, 8, 16))
    one, again, other = task.batches(0, 2, 4), task.batches(0, 2, 4), task.batches(1, 2, 4)
    held = task.batches(0, 2, 4, part="held out")
    assert all(
        torch.equal(a.batch, b.batch) and torch.equal(a.targets, b.targets) for a, b in zip(one, again, strict=True)
    )
    assert not torch.equal(one[0].batch, one[1].batch)
    assert not torch.equal(one[0].batch, other[0].batch)
    assert not torch.equal(one[0].batch, held[0].batch)


@pytest.mark.parametrize(
    ("make", "batch", "name", "chance"),
    [
        (of_llama, {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}, "text", math.log(16)),
        (lambda: of_bert("BertModel"), {"input_ids": IDS}, "riddles", math.log(16)),
        (lambda: of_bert("BertForMaskedLM"), {"input_ids": IDS, "labels": IDS}, "riddles", math.log(16)),
        (lambda: of_bert("BertForSequenceClassification", num_labels=3), {"input_ids": IDS}, "topic", math.log(3)),
        (encoder, torch.randn(2, 12, 16), "riddles", math.log(16)),
        (encoder, (torch.randn(2, 12, 16),), "riddles", math.log(16)),
        (Bigram, IDS, "text", math.log(16)),
        (lambda: of_zoo(kind="decoder"), {"input_ids": IDS}, "text", math.log(16)),
        (lambda: of_zoo(kind="encoder"), {"input_ids": IDS}, "riddles", math.log(16)),
        (lambda: of_zoo(kind="encoder", classes=4), {"input_ids": IDS}, "topic", math.log(4)),
        (lambda: of_zoo(kind="vision", image=16), {"pixel_values": torch.randn(2, 3, 16, 16)}, "digits", math.log(10)),
        (lambda: StateSpace(StateSpaceConfig(depth=2, width=16)), {"input_ids": IDS}, "text", math.log(16)),
    ],
)
def test_the_task_is_of_the_kind_that_the_model_reads_and_leaves_no_trace(make, batch, name, chance):
    model = make()
    before = everything(model)
    task = task_for(model, batch)
    assert not changes(before, everything(model))
    assert (task.name, task.chance) == (name, chance)
    data = task.batches(0, 1, 4)
    course = train(model, data, steps=1, loss=task.objective, held_out=data)
    assert course.started[0] > task.floor
    assert len(course.started) == 4


def test_special_words_are_left_out_and_small_vocabularies_give_fewer_symbols():
    config = {"vocab_size": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    task = task_for(of_llama(**config), {"input_ids": IDS % 8})
    assert task.chance == math.log(5)
    ids = torch.cat([one.batch["input_ids"] for one in task.batches(0, 4, 8)])
    assert set(ids.unique().tolist()) == set(range(3, 8))


def test_torchs_own_encoder_with_tokens_first_is_given_tokens_first():
    with pytest.warns(UserWarning, match="nested"):
        model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32), 1)
    task = task_for(model, torch.randn(12, 2, 16))
    (batch,) = task.batches(0, 1, 4)
    assert batch.batch.shape == (12, 4, 16)
    assert batch.targets.shape == (4, 12)
    assert task.objective.each(model, batch).shape == (4,)


def test_images_are_enlarged_held_out_ones_are_others_and_classes_are_even():
    X, y = images(0, 400, shape=(3, 16, 16), classes=10, part="training")
    assert X.shape == (400, 3, 16, 16)
    assert torch.equal(X[:, 0], X[:, 2])
    assert float(X.mean()) == pytest.approx(0, abs=0.02)
    assert torch.bincount(y).min() > 20
    held, _ = images(0, 400, shape=(3, 16, 16), classes=10, part="held out")
    alike = (X[:, None, 0] - held[None, :, 0]).flatten(2).norm(dim=-1).min()
    assert is_of_digits()
    assert alike > 0


@pytest.mark.parametrize("batch", [{"mask": torch.ones(2, 3, dtype=torch.bool)}, {"x": "words"}, torch.ones(2, 3)])
def test_a_batch_without_tokens_images_or_vectors_has_no_task(batch):
    with pytest.raises(TrialError, match="task"):
        task_for(encoder(), batch)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "batch"),
    [
        (of_llama, {"input_ids": IDS}),
        (lambda: of_bert("BertModel", hidden_size=32), {"input_ids": IDS}),
        (lambda: encoder(layers=12, width=32), torch.randn(2, 32, 32)),
    ],
)
def test_a_healthy_network_learns_what_its_own_token_says_and_one_without_tokens_stays_at_chance(make, batch):
    model = make()
    task = task_for(model, batch)
    data, held = task.batches(0, 150, 32), task.batches(0, 2, 32, part="held out")
    options = {"steps": 150, "warm_up": 0.1, "loss": task.objective, "held_out": held}
    healthy = train(model, data, learning_rate=3e-3 if len(list(model.parameters())) < 60 else 1e-3, **options)
    assert healthy.final < task.own + 0.15 * (task.chance - task.own)
    assert healthy.trains(task.chance)
    first = next(name for name, p in model.named_parameters() if p.ndim == 2)

    def collapsed(module, args, output):
        output = output[0] if isinstance(output, tuple) else output
        return output.mean((0, 1), keepdim=True).expand_as(output) + 0 * output

    blocks = next(m for m in model.modules() if isinstance(m, nn.ModuleList))
    handle = blocks[-1].register_forward_hook(collapsed)
    stuck = train(model, data, learning_rate=3e-3, **options)
    handle.remove()
    assert first
    assert stuck.final > 0.97 * task.chance
    assert not stuck.trains(task.chance)
