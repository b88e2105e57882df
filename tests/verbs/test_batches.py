"""What a batch stands for: calls, masks by name and by position, tokens."""

import functools

import torch
from torch import nn
from transformers import BertConfig, BertModel, T5Config, T5Model

import fullrank
from fullrank.spec import Inputs
from fullrank.verbs.batches import as_calls

examine = functools.partial(fullrank.examine, reference=False)  # rows are compared here, not verdicts


def bert():
    torch.manual_seed(0)
    config = BertConfig(num_hidden_layers=2, num_attention_heads=2, hidden_size=16, intermediate_size=32, vocab_size=50)
    return BertModel(config).eval()


IDS = torch.arange(1, 17).reshape(2, 8)
MASK = torch.tensor([[1] * 8, [1] * 5 + [0] * 3])


def values(report):
    return {row.key: row.value for row in report.rows}


def test_a_mask_is_found_by_name_and_by_position():
    model = bert()
    (by_name,) = as_calls(model, {"input_ids": IDS, "attention_mask": MASK})
    (by_position,) = as_calls(model, (IDS, MASK))
    assert torch.equal(by_name.real, MASK.bool())
    assert torch.equal(by_position.real, MASK.bool())
    assert by_name.tokens == by_position.tokens == 13


def test_labels_and_masks_are_no_token_ids():
    (call,) = as_calls(bert(), {"labels": torch.ones(2, 1, dtype=torch.long), "input_ids": IDS})
    assert torch.equal(call.token_ids, IDS)


def test_torch_modules_say_what_is_hidden():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 1)
    (call,) = as_calls(model, {"src": torch.randn(2, 8, 16), "src_key_padding_mask": ~MASK.bool()})
    assert torch.equal(call.real, MASK.bool())


def test_an_encoder_and_a_decoder_have_masks_of_their_own():
    config = T5Config(num_layers=1, d_model=16, d_ff=32, d_kv=8, num_heads=2, vocab_size=50)
    (call,) = as_calls(T5Model(config), {"input_ids": IDS, "attention_mask": MASK, "decoder_input_ids": IDS[:, :4]})
    assert list(call.real) == ["encoder"]


class WithoutMask(nn.Module):
    """Plain code whose forward takes no mask."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(50, 16)
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True) for _ in range(2))

    def forward(self, input_ids):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return x


def test_padding_of_inputs_is_known_also_where_the_model_takes_no_mask():
    model = WithoutMask().eval()
    inputs = Inputs([{"input_ids": IDS}], [MASK.bool()], "text", "two documents", 2, 13)
    assert values(examine(model, inputs)) == values(examine(model, IDS, mask=MASK.bool()))
    assert values(examine(model, inputs)) != values(examine(model, IDS))
