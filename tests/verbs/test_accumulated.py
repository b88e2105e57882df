"""Batches one after the other, the last one smaller, give the report of the joined batch: every kind of row."""

import functools
import math

import pytest
import torch
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, LlamaModel

import fullrank
from alike import differences, numbers

examine = functools.partial(fullrank.examine, reference=False)  # rows are compared here, not verdicts


SEQUENCES, TOKENS = 4, 40
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50, "intermediate_size": 32}


@functools.cache
def model(name):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if name == "encoder":
            return BertModel(BertConfig(**SIZES)).eval()
        grouped = {"num_key_value_heads": 2, "initializer_range": 0.3, "pad_token_id": None}
        return LlamaModel(LlamaConfig(**SIZES, **grouped)).eval()


def joined():
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 50, (SEQUENCES, TOKENS), generator=generator)
    return {"input_ids": ids, "attention_mask": (torch.arange(TOKENS) < torch.tensor([[40], [33], [40], [27]])).long()}


def packed():
    positions = torch.cat([torch.arange(24), torch.arange(16)]).expand(SEQUENCES, -1)
    return {"input_ids": joined()["input_ids"], "position_ids": positions}


class Loader:
    """What a DataLoader is: something that can be iterated, and knows no more."""

    def __init__(self, batch, sizes):
        self.batch, self.sizes = batch, sizes

    def __iter__(self):
        start = 0
        for size in self.sizes:
            yield {name: tensor[start : start + size] for name, tensor in self.batch.items()}
            start += size


OF_PARAMETERS = {
    *("gradient_norm", "gradient_heterogeneity", "elasticity", "elasticity_ratio", "query_key_to_value_output"),
}
"""From random projections these are estimates, in which sequences of one batch mix and those of several do not."""


def assert_same(report, other, *, projected=frozenset()):
    assert not differences(report, other, tolerance=1e-4, absolute=1e-6, but={"bulk_excess", *projected})
    rows, others = numbers(report), numbers(other)
    for key, (value, stderr, n, exact) in rows.items():
        theirs, their_stderr, *of_theirs = others[key]
        if key[-1] in {"bulk_excess", *projected}:
            assert ((value is None), n, exact) == ((theirs is None), *of_theirs), key
        if key[-1] in projected:
            assert not exact, key
        if key[-1] == "bulk_excess":  # the permutations that it is read against are drawn anew in every batch
            assert abs(value - theirs) <= 3 * math.hypot(stderr, their_stderr), key


KINDS = {
    "plain": {},
    "gradients": {"spectrum": False, "gradients": True, "probes": 2},
    "weights": {"spectrum": False, "weights": True},
    "contexts": {"spectrum": False, "contexts": (8, 16, 24)},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["encoder", "decoder"])
def test_batches_one_by_one_give_the_joined_report(name, kind):
    together = examine(model(name), joined(), **KINDS[kind])
    loader = Loader(joined(), (2, 1, 1))
    apart = examine(model(name), iter(loader) if kind == "plain" else loader, **KINDS[kind])
    assert_same(apart, together, projected=OF_PARAMETERS if kind == "gradients" else frozenset())
    assert apart.about["input"]["tokens"] == together.about["input"]["tokens"] == 140
    assert len(apart.context_slopes) == len(together.context_slopes)


def test_gradients_of_a_loss_add_up_over_batches():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        grouped = {"num_key_value_heads": 2, "initializer_range": 0.3, "pad_token_id": None}
        network = LlamaForCausalLM(LlamaConfig(**SIZES, **grouped)).eval()
    batch = {"input_ids": joined()["input_ids"], "labels": joined()["input_ids"]}
    together = examine(network, batch, spectrum=False, gradients=True)
    apart = examine(network, Loader(batch, (3, 1)), spectrum=False, gradients=True)
    assert apart.about["gradients"] == "the model's own loss"
    assert {row.metric for row in apart.rows} >= OF_PARAMETERS
    assert_same(apart, together)


def test_packed_batches_one_by_one_give_the_joined_report():
    together = examine(model("decoder"), packed(), spectrum=False)
    apart = examine(model("decoder"), Loader(packed(), (3, 1)), spectrum=False)
    assert_same(apart, together)
    assert any("4 rows hold 8 packed documents" in note for note in apart.about["notes"])


def test_batches_of_different_lengths_are_accumulated():
    ids = joined()["input_ids"]
    apart = examine(model("decoder"), ({"input_ids": one} for one in (ids[:3], ids[3:, :27])), spectrum=False)
    mask = torch.ones_like(ids)
    mask[3, 27:] = 0
    together = examine(model("decoder"), {"input_ids": ids, "attention_mask": mask}, spectrum=False)
    assert not differences(apart, together, tolerance=1e-4, absolute=1e-6)
    assert sum(value is not None for value, *_ in numbers(apart).values()) > 100
