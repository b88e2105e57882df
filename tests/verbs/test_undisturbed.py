"""Examining leaves a model exactly as it was, also when it is broken off in the middle."""

import copy

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2Model

import fullrank
from fullrank.measure import StreamObserver
from untouched import changes, everything


def gpt2():
    return GPT2Model(GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=50, n_positions=32))


def bert():
    return BertModel(
        BertConfig(num_hidden_layers=2, num_attention_heads=2, hidden_size=16, intermediate_size=32, vocab_size=50)
    )


class WithBatchNorm(nn.Module):
    """Buffers that move in training mode, and dropout that draws."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.5, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.norm = nn.BatchNorm1d(16)

    def forward(self, ids):
        return self.norm(self.encoder(self.embed(ids)).transpose(1, 2))


@pytest.mark.parametrize("build", [gpt2, bert, WithBatchNorm])
@pytest.mark.parametrize("end", ["finished", "failed", "interrupted"])
def test_everything_is_as_before(build, end, monkeypatch):
    torch.manual_seed(0)
    model = build().train()
    next(iter(model.children())).eval()  # a frozen submodule that `model.train()` would wake
    ids = torch.arange(24).reshape(2, 12)
    output = model(ids)
    output = output if isinstance(output, torch.Tensor) else output.last_hidden_state
    output.square().sum().backward()  # gradients that must stay
    before = everything(model)

    seen = []
    stop = {"failed": RuntimeError("broken off"), "interrupted": KeyboardInterrupt()}.get(end)
    original = StreamObserver.see

    def see(self, event):
        seen.append(event.layer)
        if stop is not None and event.layer == 1:
            raise stop
        original(self, event)

    monkeypatch.setattr(StreamObserver, "see", see)
    if stop is None:
        fullrank.examine(model, ids)
    else:
        with pytest.raises((type(stop), fullrank.FullrankError)):
            fullrank.examine(model, ids)
    assert seen
    assert not changes(before, everything(model))


@pytest.mark.parametrize("build", [gpt2, bert])
def test_outputs_before_during_and_after_are_the_same_bits(build):
    torch.manual_seed(0)
    model = build().eval()
    ids = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        before = model(ids, use_cache=False).last_hidden_state
    outputs = []
    handle = model.register_forward_hook(lambda m, args, output: outputs.append(output.last_hidden_state.clone()))
    fullrank.examine(copy.copy(model), ids)
    handle.remove()
    with torch.no_grad():
        after = model(ids, use_cache=False).last_hidden_state
    assert outputs
    for output in (*outputs, after):
        assert torch.equal(before, output)
