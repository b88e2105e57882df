"""Where gradients cannot come from, batch by batch: labels of which none counts, in some batches only, no probe."""

import math

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

import fullrank
from fullrank.errors import BatchError


def llama(seed=0):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes)).eval()


def ids(sequences=3, tokens=8, seed=0):
    return torch.randint(50, (sequences, tokens), generator=torch.Generator().manual_seed(seed))


def labelled(x):
    return {"input_ids": x, "labels": x}


def look(model, batch, **options):
    return fullrank.examine(model, batch, gradients=True, spectrum=False, **options)


def gradients(report):
    return [row for row in report.rows if row.site == "gradient" and row.metric != "angle_exponent"]


def test_a_loss_that_is_no_number_has_no_gradients_and_says_so():
    x = ids()
    report = look(llama(), {"input_ids": x, "labels": torch.full_like(x, -100)})
    assert gradients(report)
    assert all(row.value is None and "loss is nan" in row.note for row in gradients(report))
    assert any("no gradients: the model's own loss is nan" in note for note in report.about["notes"])
    assert report.about["gradients"] == "nothing"


def test_a_batch_without_a_label_that_counts_leaves_the_numbers_of_the_others():
    x = ids()
    empty = {"input_ids": x, "labels": torch.full_like(x, -100)}
    alone, both = look(llama(), labelled(x)), look(llama(), [labelled(x), empty])
    assert both.about["gradients"] == "the model's own loss"
    expected = {row.key: row.value for row in gradients(alone)}
    found = {row.key: row.value for row in gradients(both)}
    assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("turned", [False, True])
def test_labels_in_some_batches_only_are_refused(turned):
    batches = [labelled(ids()), {"input_ids": ids(seed=1)}]
    with pytest.raises(BatchError, match="only some of its batches gave a loss"):
        look(llama(), batches[::-1] if turned else batches)


@pytest.mark.parametrize("probes", [0, -1])
def test_no_probe_is_refused(probes):
    with pytest.raises(BatchError, match=f"probes={probes}; at least one"):
        look(llama(), {"input_ids": ids()}, probes=probes)


def test_inference_mode_around_the_call_is_named_as_the_reason():
    with torch.inference_mode():
        report = look(llama(), labelled(ids()))
    assert any("no gradients: torch.inference_mode is on" in note for note in report.about["notes"])


class Routed(nn.Module):
    """A block whose second MLP runs only where the first token is even."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.extra = inner, nn.Linear(16, 16)

    def forward(self, hidden_states, **given):
        x = self.inner(hidden_states, **given)
        return x + self.extra(x) if bool(self.used) else x


def test_what_enters_one_batch_only_is_not_said_to_enter_none():
    model = llama()
    model.model.layers[0] = Routed(model.model.layers[0])

    def route(module, args, given):
        model.model.layers[0].used = int(given["input_ids"][0, 0]) % 2 == 0

    model.register_forward_pre_hook(route, with_kwargs=True)
    x, y = ids(), ids(seed=1)
    x[0, 0], y[0, 0] = 2, 3
    report = look(model, [labelled(x), labelled(y)])
    rows = {row.part: row for row in gradients(report) if row.metric == "gradient_norm"}
    row = rows["model.layers.0.extra.weight"]
    assert row.note == ""
    one = {r.part: r.value for r in gradients(look(model, labelled(x))) if r.metric == "gradient_norm"}
    assert row.value == pytest.approx(one["model.layers.0.extra.weight"] / 2, rel=1e-5)
    inside = [r for name, r in rows.items() if ".layers." in name]
    sizes = dict(model.named_parameters())
    g = torch.tensor([r.value / math.sqrt(sizes[r.part].numel()) for r in inside], dtype=torch.float64)
    gini = (g[:, None] - g).abs().sum() / (2 * len(g) ** 2 * g.mean())
    (spread,) = [row for row in report.rows if row.metric == "gradient_heterogeneity"]
    assert spread.value == pytest.approx(float(gini), rel=1e-6)


def test_an_encoder_has_no_unembedding_only_because_its_decoder_has():
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "vocab_size": 50}
    model = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0)).eval()
    report = look(model, {"input_ids": ids(), "labels": ids(seed=1)}, weights=True)
    for site in ("weights", "gradient"):
        found = {(row.stack, row.part) for row in report.rows if row.site == site and row.part.endswith("embed")}
        assert found == {("encoder", "embed"), ("decoder", "embed"), ("decoder", "unembed")}


class Fails(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise RuntimeError("no way back from here")


def test_parameters_before_a_backward_that_fails_have_its_reason():
    model = llama()
    model.model.embed_tokens.register_forward_hook(lambda module, args, output: Fails.apply(output))
    report = look(model, {"input_ids": ids()})
    rows = {row.part: row for row in gradients(report) if row.metric == "gradient_norm"}
    first, last = rows["model.embed_tokens.weight"], rows["model.layers.1.mlp.down_proj.weight"]
    assert (first.value, first.note) == (None, "the model's backward failed: no way back from here")
    assert last.value > 0
    assert any("but those that had come by then" in note for note in report.about["notes"])


@pytest.mark.parametrize(("dtype", "told"), [(torch.float16, True), (torch.bfloat16, False), (torch.float32, False)])
def test_float16_without_a_loss_scale_is_told(dtype, told):
    model = llama().to(dtype)
    assert any("without a loss scale" in note for note in look(model, labelled(ids())).about["notes"]) == told
    assert not any("loss scale" in note for note in look(model, {"input_ids": ids()}).about["notes"])


def test_a_loss_of_one_entry_is_a_loss():
    class Row(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = llama()

        def forward(self, input_ids, labels):
            output = self.inner(input_ids=input_ids, labels=labels, use_cache=False)
            output.loss = output.loss.reshape(1)
            return output

    expected = [row.value for row in gradients(look(llama(), labelled(ids())))]
    report = look(Row(), labelled(ids()))
    assert report.about["gradients"] == "the model's own loss"
    assert [row.value for row in gradients(report)] == expected
