"""Bad input to `examine`: one clear sentence, and nothing left behind."""

import copy

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2Model

import fullrank
from fullrank.errors import BatchError, FullrankError, ModelError, NonFiniteError, ShapeError


@pytest.fixture
def gpt2():
    torch.manual_seed(0)
    return GPT2Model(GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=50, n_positions=32)).eval()


@pytest.fixture
def bert():
    torch.manual_seed(0)
    config = BertConfig(num_hidden_layers=2, num_attention_heads=2, hidden_size=16, intermediate_size=32, vocab_size=50)
    return BertModel(config).eval()


def sentence(error):
    text = str(error.value)
    assert "\n" not in text
    assert len(text) < 400
    return text


def test_heads_and_probes_are_refused_before_the_model_is_looked_for():
    with pytest.raises(ShapeError, match="is no head"):
        fullrank.examine("./nowhere", heads=["x"])
    with pytest.raises(BatchError, match="leaves out"):
        fullrank.examine("./nowhere", heads=["1.0"], spectrum=False)
    with pytest.raises(BatchError, match="at least one random projection"):
        fullrank.examine("./nowhere", probes=0)


def test_non_finite_weights_name_the_parameter(gpt2):
    gpt2.h[1].mlp.c_fc.weight.data[0, 0] = torch.nan
    with pytest.raises(NonFiniteError) as error:
        fullrank.examine(gpt2, torch.arange(16).reshape(2, 8))
    assert "h.1.mlp.c_fc.weight" in sentence(error)


def test_non_finite_activations_name_the_first_module(gpt2):
    class Overflow(nn.Module):
        def forward(self, x):
            return x * 1e38 * 1e38

    gpt2.h[1].mlp.act = Overflow()
    with pytest.raises(NonFiniteError) as error:
        fullrank.examine(gpt2, torch.arange(16).reshape(2, 8))
    assert "'h.1.mlp.act'" in sentence(error)


def test_a_batch_that_does_not_fit_says_what_was_passed(gpt2):
    with pytest.raises(BatchError) as error:
        fullrank.examine(gpt2, {"pixel_values": torch.zeros(1, 3, 8, 8)})
    assert "pixel_values (1, 3, 8, 8)" in sentence(error)
    with pytest.raises(BatchError) as error:
        fullrank.examine(gpt2, torch.zeros(2, 8, dtype=torch.long) + 99)  # beyond the vocabulary
    assert "does not fit GPT2Model" in sentence(error)


def test_a_context_beyond_the_models_positions(gpt2):
    with pytest.raises(FullrankError) as error:
        fullrank.examine(gpt2, torch.zeros(1, 64, dtype=torch.long))
    assert sentence(error)


def test_one_token_has_no_pairs(bert):
    with pytest.raises(BatchError) as error:
        fullrank.examine(bert, {"input_ids": torch.tensor([[3]])})
    assert "one token" in sentence(error)


def test_all_tokens_masked(bert):
    batch = {"input_ids": torch.ones(2, 4, dtype=torch.long), "attention_mask": torch.tensor([[1, 1, 1, 1], [0] * 4])}
    with pytest.raises(BatchError) as error:
        fullrank.examine(bert, batch)
    assert "sequence 1 are masked" in sentence(error)


def test_no_blocks_names_the_argument():
    with pytest.raises(ModelError) as error:
        fullrank.examine(nn.Linear(4, 4), torch.randn(2, 3, 4))
    assert "blocks=" in sentence(error)


def test_an_empty_iterable_and_something_that_is_no_batch(gpt2):
    with pytest.raises(BatchError, match="empty iterable"):
        fullrank.examine(gpt2, [])
    with pytest.raises(BatchError, match="is no batch"):
        fullrank.examine(gpt2, 3)
    with pytest.raises(BatchError, match="neither a module nor a SPEC"):
        fullrank.examine(3)


@pytest.mark.parametrize("fault", ["batch", "weights"])
def test_nothing_is_left_behind_after_an_error(gpt2, fault):
    gpt2.train()
    gpt2.h[0].eval()
    batch = torch.zeros(2, 8, dtype=torch.long) + 99
    if fault == "weights":
        gpt2.h[1].mlp.c_fc.weight.data[0, 0] = torch.inf
    flags = [module.training for module in gpt2.modules()]
    state = copy.deepcopy(gpt2.state_dict())
    random = torch.get_rng_state()
    with pytest.raises(FullrankError):
        fullrank.examine(gpt2, batch)
    assert flags == [module.training for module in gpt2.modules()]
    assert all(torch.equal(value, state[name]) for name, value in gpt2.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in gpt2.modules()]
    assert not any(hooks)


def test_what_a_builtin_says_about_shapes_is_one_sentence_too():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    with pytest.raises(BatchError) as error:
        fullrank.examine(model, torch.randn(2, 5, 8))  # width 8 for a model of width 16
    assert "does not fit TransformerEncoder" in sentence(error)


def test_an_attention_mask_of_the_wrong_length(bert):
    batch = {"input_ids": torch.ones(2, 6, dtype=torch.long), "attention_mask": torch.ones(2, 5, dtype=torch.long)}
    with pytest.raises(BatchError) as error:
        fullrank.examine(bert, batch)
    assert "mask has the shape (2, 5); the batch's tokens have (2, 6)" in sentence(error)


def test_a_mask_must_be_of_sequences_and_tokens(gpt2):
    ids = torch.arange(16).reshape(2, 8)
    with pytest.raises(BatchError, match=r"mask has the shape \(8,\)"):
        fullrank.examine(gpt2, ids, mask=torch.ones(8, dtype=torch.bool))
    with pytest.raises(BatchError, match=r"the batch's tokens have \(2, 8\)"):
        fullrank.examine(gpt2, ids, mask=torch.ones(2, 7, dtype=torch.bool))
    with pytest.raises(BatchError, match="goes with one batch"):
        fullrank.examine(gpt2, [ids, ids], mask=torch.ones(2, 8, dtype=torch.bool))


def test_a_fault_of_an_observer_is_not_blamed_on_the_batch(gpt2, monkeypatch):
    def broken(self, event):
        torch.zeros(2) @ torch.zeros(3)

    monkeypatch.setattr("fullrank.measure.StreamObserver.see", broken)
    with pytest.raises(RuntimeError) as error:
        fullrank.examine(gpt2, torch.arange(16).reshape(2, 8))
    assert not isinstance(error.value, FullrankError)


def test_the_shape_of_a_mask_is_checked_before_what_it_hides(gpt2):
    with pytest.raises(BatchError, match=r"the mask has the shape \(3, 3\)") as error:
        fullrank.examine(gpt2, torch.arange(24).reshape(3, 8), mask=torch.eye(3, dtype=torch.bool))
    sentence(error)


@pytest.mark.parametrize("asked", [{"heads": 3}, {"heads": "x.y"}, {"seconds": "x"}, {"seconds": 0}])
def test_arguments_of_the_wrong_kind_are_named(gpt2, asked):
    with pytest.raises(FullrankError, match=next(iter(asked))) as error:
        fullrank.examine(gpt2, torch.arange(16).reshape(2, 8), **asked)
    sentence(error)
