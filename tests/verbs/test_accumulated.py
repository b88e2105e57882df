"""Batches one after the other, the last one smaller, give the report of the joined batch: every kind of row."""

import functools
import math

import pytest
import torch
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, LlamaModel

import fullrank

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
    rows, others = ({row.key: row for row in one.rows} for one in (report, other))
    assert rows.keys() == others.keys()
    for key, row in rows.items():
        expected = others[key]
        assert (row.value is None, row.n, row.exact) == (expected.value is None, expected.n, expected.exact), key
        if key[-1] == "bulk_excess":  # the permutations that it is read against are drawn anew in every batch
            assert abs(row.value - expected.value) <= 3 * math.hypot(row.stderr, expected.stderr), key
            continue
        if key[-1] in projected:
            assert not row.exact, key
            continue
        if row.value is not None:
            assert row.value == pytest.approx(expected.value, rel=1e-4, abs=1e-6), key
        if row.stderr is not None:
            assert row.stderr == pytest.approx(expected.stderr, rel=1e-3, abs=1e-6), key


KINDS = {
    "plain": {},
    "gradients": {"spectrum": False, "gradients": True, "probes": 2},
    "weights": {"spectrum": False, "weights": True},
    "contexts": {"spectrum": False, "contexts": (8, 16, 24)},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["encoder", "decoder"])
def test_batches_one_by_one_give_the_joined_report(name, kind):
    together = fullrank.examine(model(name), joined(), **KINDS[kind])
    loader = Loader(joined(), (2, 1, 1))
    apart = fullrank.examine(model(name), iter(loader) if kind == "plain" else loader, **KINDS[kind])
    assert_same(apart, together, projected=OF_PARAMETERS if kind == "gradients" else frozenset())
    assert apart.about["input"]["tokens"] == together.about["input"]["tokens"] == 140
    assert len(apart.context_slopes) == len(together.context_slopes)


def test_gradients_of_a_loss_add_up_over_batches():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        grouped = {"num_key_value_heads": 2, "initializer_range": 0.3, "pad_token_id": None}
        network = LlamaForCausalLM(LlamaConfig(**SIZES, **grouped)).eval()
    batch = {"input_ids": joined()["input_ids"], "labels": joined()["input_ids"]}
    together = fullrank.examine(network, batch, spectrum=False, gradients=True)
    apart = fullrank.examine(network, Loader(batch, (3, 1)), spectrum=False, gradients=True)
    assert apart.about["gradients"] == "the model's own loss"
    assert {row.metric for row in apart.rows} >= OF_PARAMETERS
    assert_same(apart, together)


def test_packed_batches_one_by_one_give_the_joined_report():
    together = fullrank.examine(model("decoder"), packed(), spectrum=False)
    apart = fullrank.examine(model("decoder"), Loader(packed(), (3, 1)), spectrum=False)
    assert_same(apart, together)
    assert any("4 rows hold 8 packed documents" in note for note in apart.about["notes"])


def test_batches_of_different_lengths_are_accumulated():
    ids = joined()["input_ids"]
    apart = fullrank.examine(model("decoder"), ({"input_ids": one} for one in (ids[:3], ids[3:, :27])), spectrum=False)
    mask = torch.ones_like(ids)
    mask[3, 27:] = 0
    together = fullrank.examine(model("decoder"), {"input_ids": ids, "attention_mask": mask}, spectrum=False)
    rows, others = ({row.key: row for row in one.rows} for one in (apart, together))
    assert rows.keys() == others.keys()
    for key, row in rows.items():
        if row.value is not None and row.exact:
            assert row.value == pytest.approx(others[key].value, rel=1e-4, abs=1e-6), key
