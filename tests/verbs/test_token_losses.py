"""The loss by position: what the model's own logits give, where they are its own loss, and a reason elsewhere."""

import math
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel, GPT2Model
from transformers.utils import logging

import fullrank
from untouched import changes, everything

CONTEXTS = (8, 12, 16)
CONFIG = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 30, "n_positions": 32,
          "bos_token_id": 29, "eos_token_id": 29, "pad_token_id": 0, "initializer_range": 0.4}  # fmt: skip
IDS = torch.randint(1, 29, (4, 16), generator=torch.Generator().manual_seed(0))


def built(kind=GPT2LMHeadModel):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return kind(GPT2Config(**CONFIG)).eval()


def examined(model, batch=IDS, **options):
    return fullrank.examine(model, batch, contexts=CONTEXTS, spectrum=False, reference=False, **options)


def losses(report):
    return {row.scope: row for row in report.rows if row.metric == "token_loss"}


def by_position(model, ids):
    """−log of the probability of the next token, (sequences, tokens − 1), one sequence at a time."""
    with torch.no_grad():
        found = [model(input_ids=one[None]).logits[0].double().log_softmax(-1) for one in ids]
    return [[-float(z[t, one[t + 1]]) for t in range(len(one) - 1)] for z, one in zip(found, ids, strict=True)]


def expected(model, ids, context):
    """Of the queries that see more than half of the context, those whose next token is there."""
    return [np.mean(one[context // 2 : context]) for one in by_position(model, ids)]


@pytest.mark.parametrize("labels", [False, True])
def test_it_is_the_mean_loss_of_late_tokens_at_each_context(labels):
    model = built()
    before = everything(model)
    report = examined(model, {"input_ids": IDS, "labels": IDS} if labels else IDS)
    assert not changes(before, everything(model))
    rows = losses(report)
    assert list(rows) == [f"late+context={context}" for context in CONTEXTS]
    for context, row in zip(CONTEXTS, rows.values(), strict=True):
        values = expected(model, IDS, context)
        assert row.value == pytest.approx(np.mean(values), rel=1e-5)
        assert row.stderr == pytest.approx(np.std(values, ddof=1) / 2, rel=1e-4)
        assert (row.stack, row.layer, row.site, row.n) == ("decoder", 1, "stream", 4)


def test_its_slope_over_contexts_is_that_of_each_sequence():
    model = built()
    (slope,) = [slope for slope in examined(model).context_slopes if slope.metric == "token_loss"]
    values = np.array([expected(model, IDS, context) for context in CONTEXTS])
    slopes = np.polyfit(np.log2(CONTEXTS), values, 1)[0]
    assert slope.per_doubling == pytest.approx(slopes.mean(), rel=1e-4)
    assert slope.stderr == pytest.approx(slopes.std(ddof=1) / 2, rel=1e-4)
    assert slope.contexts == CONTEXTS


@pytest.mark.parametrize("side", ["left", "right"])
def test_positions_count_real_tokens_and_a_short_sequence_drops_out(side):
    model = built()
    lengths = [16, 16, 11, 16]
    ids, mask = torch.zeros(4, 20, dtype=torch.long), torch.zeros(4, 20, dtype=torch.long)
    for n, length in enumerate(lengths):
        place = slice(20 - length, 20) if side == "left" else slice(0, length)
        ids[n, place], mask[n, place] = IDS[n, :length], 1
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    rows = losses(examined(model, {"input_ids": ids, "attention_mask": mask, "position_ids": positions}))
    for context, row in zip(CONTEXTS, rows.values(), strict=True):
        long = [one[:length] for one, length in zip(IDS, lengths, strict=True) if length >= context]
        assert row.n == len(long)
        values = [np.mean(one[context // 2 : context]) for one in by_position(model, long)]
        assert row.value == pytest.approx(np.mean(values), rel=1e-5)


def test_several_batches_are_one():
    model = built()
    whole, parts = losses(examined(model)), losses(examined(model, [IDS[:1], IDS[1:]]))
    for scope, row in whole.items():
        assert (parts[scope].value, parts[scope].n) == (pytest.approx(row.value, rel=1e-6), 4)


def test_tokens_whose_label_is_left_out_do_not_count():
    model = built()
    labels = IDS.clone()
    labels[:, :13] = -100
    rows = losses(examined(model, {"input_ids": IDS, "labels": labels}))
    assert rows["late+context=8"].value is None
    assert rows["late+context=16"].value == pytest.approx(np.mean([one[12:] for one in by_position(model, IDS)]))


class Smoothed(GPT2LMHeadModel):
    """A loss of its own making."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        if output.loss is not None:
            output.loss = 0.9 * output.loss + 0.1 * math.log(30)
        return output


class Plain(nn.Module):
    """Logits and no labels."""

    def __init__(self):
        super().__init__()
        self.model = built()

    def forward(self, input_ids):
        return {"logits": self.model(input_ids=input_ids).logits}


@pytest.mark.parametrize(
    ("make", "batch", "reason"),
    [
        (lambda: built(GPT2Model), {"input_ids": IDS}, "the model returns no logits of every token"),
        (lambda: built(Smoothed), {"input_ids": IDS}, "is not that of its logits for the next token"),
        (lambda: built(Smoothed), {"input_ids": IDS, "labels": IDS}, "is not that of its logits for the next token"),
        (lambda: built(GPT2ForSequenceClassification), {"input_ids": IDS}, "returns no logits of every token"),
        (Plain, {"input_ids": IDS}, "the model takes no labels"),
    ],
)
def test_a_loss_that_cannot_be_seen_is_a_number_that_is_missing_with_the_reason(make, batch, reason):
    rows = losses(examined(make(), batch))
    assert [row.value for row in rows.values()] == [None] * 3
    assert all(reason in row.note for row in rows.values())


def test_what_looks_both_ways_predicts_no_next_token():
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    assert not losses(examined(BertModel(BertConfig(**sizes, vocab_size=30)).eval()))


def test_without_contexts_nothing_is_run_for_it():
    report = fullrank.examine(built(), IDS, spectrum=False, reference=False)
    assert not losses(report)


class Talks(GPT2LMHeadModel):
    """Has something to say wherever it is given labels."""

    def forward(self, *args, **kwargs):
        if kwargs.get("labels") is not None:
            logging.get_logger("transformers.models").warning("a word on losses")
            warnings.warn("another", stacklevel=1)
        return super().forward(*args, **kwargs)


def test_labels_that_nobody_passed_are_not_talked_of(capfd):
    assert all(row.value for row in losses(examined(built(Talks))).values())
    assert capfd.readouterr().err == ""
