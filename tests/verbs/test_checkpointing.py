"""Activation checkpointing changes neither what is seen nor the gradients that are taken."""

import functools
import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential
from transformers import LlamaConfig, LlamaForCausalLM

import fullrank
from alike import differences
from untouched import changes, everything

examine = functools.partial(fullrank.examine, reference=False)  # rows are compared here, not verdicts


IDS = torch.randint(50, (2, 12), generator=torch.Generator().manual_seed(0))
LABELLED = {"input_ids": IDS, "labels": IDS}


def llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "vocab_size": 50}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1)).train()


def state(model):
    return everything(model) | {"checkpointing": [getattr(m, "gradient_checkpointing", None) for m in model.modules()]}


class Net(nn.Module):
    """A model that checkpoints its blocks by itself, in evaluation too."""

    def __init__(self, way):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(50, 16)
        make = {"dropout": 0.0, "batch_first": True}
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(16, 2, 32, **make) for _ in range(3))
        self.way = way

    def forward(self, ids):
        x = self.embed(ids)
        if self.way == "in segments":
            return checkpoint_sequential(list(self.layers), 2, x, use_reentrant=False)
        for layer in self.layers:
            x = layer(x) if self.way == "plain" else checkpoint(layer, x, use_reentrant=self.way == "reentrant")
        return x


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_model_with_checkpointing_enabled_has_the_rows_of_one_without(reentrant, gradients):
    plain, model = llama(), llama()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers is renaming it
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model(**LABELLED).loss.backward()
    before = state(model)
    options = {"spectrum": False, "gradients": gradients}
    report = examine(model, LABELLED, **options)
    assert not changes(before, state(model))
    assert not differences(report, examine(plain, LABELLED, **options))
    assert bool(report.rows.where(site="gradient").rows) == gradients


@pytest.mark.parametrize("way", ["reentrant", "non-reentrant", "in segments"])
def test_checkpointing_inside_the_model_is_seen_through(way):
    report, plain = (examine(Net(one), IDS) for one in (way, "plain"))
    assert not differences(report, plain)


@pytest.mark.parametrize("way", ["non-reentrant", "in segments"])
def test_gradients_through_checkpointing_inside_the_model_are_the_same(way):
    report, plain = (examine(Net(one), IDS, spectrum=False, gradients=True) for one in (way, "plain"))
    assert not differences(report, plain, tolerance=1e-6)
    assert any(row.value is not None for row in report.rows.where(site="gradient").rows)


def test_gradients_inside_reentrant_checkpointing_are_na_with_the_reason():
    report, plain = (examine(Net(one), IDS, spectrum=False, gradients=True) for one in ("reentrant", "plain"))
    rows, expected = ({row.key: row for row in one.rows} for one in (report, plain))
    missing = {key for key, row in rows.items() if row.metric.startswith("gradient_")}
    assert missing
    for key in missing:
        assert rows[key].value is None
        assert "reentrant" in rows[key].note
    forward = {key: row for key, row in expected.items() if row.site != "gradient"}
    assert {key: rows[key] for key in forward} == forward
    assert any("reentrant activation checkpointing" in note for note in report.about["notes"])
