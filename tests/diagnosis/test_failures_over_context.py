"""Failures over context, end to end: attention that averages planted in some layers of networks whose heads choose."""

import functools
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel

import fullrank
from fullrank.capture import survey
from fullrank.diagnosis import Evidence, context_dilution, diagnose, rank_collapse_width
from fullrank.diagnosis.effects import Trials
from fullrank.diagnosis.over_contexts import growths
from fullrank.report.verdict import Severity
from fullrank.spec import subject_of
from fullrank.verbs.batches import as_calls

CONTEXTS = (16, 64)
WIDTH, LAYERS = 256, 3  # more than the longest context: beyond its width a network falls slower
FAILURES = [rank_collapse_width.FAILURE, context_dilution.FAILURE]
SIZES = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 2, "intermediate_size": 32,
         "vocab_size": 300, "max_position_embeddings": 80}  # fmt: skip


def fresh(kind):
    """The architecture at its default initialisation."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind == "encoder":
            return BertModel(BertConfig(**SIZES), add_pooling_layer=False).eval()
        return LlamaModel(LlamaConfig(**SIZES, num_key_value_heads=2, pad_token_id=None)).eval()


@torch.no_grad()
def choosing(kind, averaging=()):
    """Queries and keys scaled until each query chooses a few keys, in all layers but those that average."""
    model = fresh(kind)
    for name, weight in model.named_parameters():
        layer = next((int(part) + 1 for part in name.split(".") if part.isdecimal()), 0)
        if layer and layer not in averaging and any(f"{part}.weight" in name for part in _QUERIES_AND_KEYS):
            weight *= (4.0 / (WIDTH * 0.02**2)) ** 0.5  # logits of standard deviation 4
        elif layer and any(f"{part}.weight" in name for part in _VALUES_AND_OUTPUTS):
            weight *= 1 / (0.02 * WIDTH**0.5)  # what attention writes is as large as what it reads
    return model


_QUERIES_AND_KEYS = ("query", "key", "q_proj", "k_proj")
_VALUES_AND_OUTPUTS = ("value", "v_proj", "attention.output.dense", "o_proj")


def batch():
    generator = torch.Generator().manual_seed(3)
    return {"input_ids": torch.randint(300, (8, CONTEXTS[-1]), generator=generator)}


def examined(model):
    return fullrank.examine(model, batch(), contexts=CONTEXTS, spectrum=False, reference=False)


@functools.cache
def at_first(kind):
    return examined(fresh(kind))


@functools.cache
def evidence(kind, averaging=()):
    """Of such a network as trained, beside its initialisation at the same contexts."""
    report = examined(choosing(kind, averaging))
    rows = (*report.rows, *at_first(kind).rows.with_source("initialisation"))
    return Evidence(rows, report.about, report.context_slopes, weights="trained")


def trials(model):
    calls = as_calls(model, batch())
    return Trials(model, survey(model, lambda: calls[0].run(model)), calls)


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_layers_that_average_at_every_length_are_named_and_heads_that_choose_are_not(kind):
    averaging = (2, 3)
    told = diagnose(evidence(kind, averaging), FAILURES)
    assert [(one.name, one.layers, one.severity) for one in told.verdicts] == [
        ("rank-collapse-width", averaging, Severity.NOTE),
        ("context-dilution", averaging, Severity.NOTE),
    ]
    width, dilution = told.verdicts
    assert all(one.value < -0.25 and one.against == "initialisation" for one in width.comparisons)
    assert all(one.value > 0.95 and one.expected > 0.95 for one in dilution.comparisons)


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_heads_that_choose_their_keys_are_clear(kind):
    told = diagnose(evidence(kind), FAILURES)
    assert told.verdicts == ()
    assert {one.name for one in told.clear} == {one.name for one in FAILURES}


def test_where_the_mean_alone_is_written_the_test_confirms_both():
    averaging = (2, 3)
    told = diagnose(evidence("encoder", averaging), FAILURES, tester=trials(choosing("encoder", averaging)))
    assert [(one.name, one.severity) for one in told.verdicts] == [
        ("rank-collapse-width", Severity.WARN),
        ("context-dilution", Severity.WARN),
    ]
    for verdict in told.verdicts:
        (effect,) = verdict.effects
        assert effect.intervention == "layers 2, 3 replaced by the mean over tokens"
        assert effect.high < 0.01


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_examine_reads_the_initialisation_at_the_same_contexts_and_compares_with_it(kind):
    """Of weights that whoever loaded them calls trained: no rows are put together by hand."""
    subject = replace(subject_of(choosing(kind, (2, 3))), fresh=False)
    report = fullrank.examine(subject, batch(), contexts=CONTEXTS, spectrum=False)
    assert report.diagnosis.weights == "trained"
    expected = {one.layer: one for one in growths(Evidence.of(at_first(kind)), "contrast_gain")}
    for one in growths(Evidence.of(report, weights="trained"), "contrast_gain"):
        assert one.together_at_first == pytest.approx(expected[one.layer].together.value, abs=0.15)  # of another draw
    for verdict in report.diagnosis.verdicts:
        if verdict.name in ("rank-collapse-width", "context-dilution"):
            assert verdict.layers == (2, 3)
            assert {one.against for one in verdict.comparisons} == {"initialisation"}
            assert "at its own initialisation" in verdict.claim
    assert {"rank-collapse-width", "context-dilution"} <= {one.name for one in report.diagnosis.verdicts}
    (loss,) = [one.words for one in report.diagnosis.unchecked if one.name == "context-dilution"]
    assert ("no logits of every token" if kind == "decoder" else "looks ahead") in loss


class Counts(nn.Module):
    """A block that writes how often each word has been seen so far: every key counts the same."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(2 * WORDS, 2 * WORDS, bias=False) for _ in range(3))
        with torch.no_grad():
            for linear in (self.q, self.k, self.v):
                linear.weight.zero_()
            self.v.weight[WORDS:, :WORDS] = torch.eye(WORDS)

    def forward(self, x):
        q, k, v = (linear(x).unflatten(-1, (2, WORDS)).transpose(1, 2) for linear in (self.q, self.k, self.v))
        found = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + found.transpose(1, 2).flatten(-2)


class BagOfWords(nn.Module):
    """Says the words that a document has used most: the more it has read, the better, and all keys are of use."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(WORDS, 2 * WORDS)
        self.blocks = nn.ModuleList(Counts() for _ in range(2))
        self.head = nn.Linear(2 * WORDS, WORDS, bias=False)
        with torch.no_grad():
            self.words.weight.copy_(torch.eye(WORDS, 2 * WORDS))
            self.head.weight.copy_(15 * torch.eye(WORDS, 2 * WORDS).roll(WORDS, 1))

    def forward(self, input_ids, labels=None):
        x = self.words(input_ids)
        for block in self.blocks:
            x = block(x)
        logits = self.head(x)
        if labels is None:
            return {"logits": logits}
        return {
            "loss": nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()),
            "logits": logits,
        }


WORDS = 32


def test_heads_that_attend_to_everything_are_no_fault_where_the_loss_falls_with_the_position():
    generator = torch.Generator().manual_seed(0)
    own = torch.stack([torch.randperm(WORDS, generator=generator)[:6] for _ in range(8)])  # each document's words
    ids = own.gather(1, torch.randint(6, (8, CONTEXTS[-1]), generator=generator))
    subject = replace(subject_of(BagOfWords().eval()), fresh=False)
    options = {"contexts": CONTEXTS, "spectrum": False, "reference": False}
    report = fullrank.examine(subject, {"input_ids": ids, "labels": ids}, **options)
    assert all(one.together.value > 0.95 for one in growths(Evidence.of(report), "effective_keys"))
    assert "context-dilution" not in {one.name for one in report.diagnosis.verdicts}
    (clear,) = [one.words for one in report.diagnosis.clear if one.name == "context-dilution"]
    assert "they are of use: the loss by position changes by −" in clear
    with torch.no_grad():
        subject.model.head.weight.zero_()  # what was read is not used: every word is as likely at every position
    report = fullrank.examine(subject, {"input_ids": ids, "labels": ids}, **options)
    (verdict,) = [one for one in report.diagnosis.verdicts if one.name == "context-dilution"]
    assert "the loss by position changes by " in verdict.claim


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_a_default_initialisation_gets_neither(kind):
    told = diagnose(Evidence.of(at_first(kind), weights="fresh"), FAILURES)
    assert told.verdicts == ()
    assert [one.name for one in told.clear] == ["rank-collapse-width"]
