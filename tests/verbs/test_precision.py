"""Half precision, 8-bit floats and autocast: rows near those in float64, and the dtype is said."""

import functools
import math

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaModel

import fullrank

examine = functools.partial(fullrank.examine, reference=False)  # rows are compared here, not verdicts


IDS = torch.randint(50, (4, 24), generator=torch.Generator().manual_seed(0))
MASK = (torch.arange(24) < torch.tensor([[24], [24], [15], [19]])).long()
BATCH = {"input_ids": IDS, "attention_mask": MASK}


def llama(dtype=torch.float32):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 50}
    model = LlamaModel(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1)).eval()
    with torch.no_grad():
        for layer in model.layers:
            layer.self_attn.q_proj.weight.mul_(8)  # so that heads differ from uniform attention
            layer.self_attn.k_proj.weight.mul_(8)
    return model.to(dtype)


@pytest.fixture(scope="module")
def exact():
    return examine(llama(torch.float64), BATCH)


# counts of what a dtype can tell apart, and which key or token is largest, may change by whole numbers
STEPS = {
    *("numerical_rank", "centered_numerical_rank", "distinct_at_dtype", "neighbourhood_overlap"),
    *("sink_position", "max_abs_position"),
}


def worst(report, exact):
    """The largest error over all rows that are no counts, relative to a number's own size or 0.1."""
    rows, expected = ({row.key: row for row in one.rows} for one in (report, exact))
    assert rows.keys() == expected.keys()
    found = {}
    for key, row in expected.items():
        assert (row.value is None) == (rows[key].value is None), key
        assert row.n == rows[key].n
        if row.value is not None and row.metric not in STEPS:
            found[key] = abs(rows[key].value - row.value) / max(0.1, abs(row.value))
    assert all(map(math.isfinite, found.values()))
    return max(found.values())


@pytest.mark.parametrize(
    ("dtype", "error"), [(torch.float32, 1e-4), (torch.float16, 0.02), (torch.bfloat16, 0.15)], ids=str
)
def test_rows_in_a_dtype_are_near_those_in_float64(exact, dtype, error):
    report = examine(llama(dtype), BATCH)
    assert report.about["dtype"] == str(dtype).removeprefix("torch.")
    assert 0 < worst(report, exact) < error


@pytest.mark.parametrize(("dtype", "error"), [(torch.float16, 0.02), (torch.bfloat16, 0.15)], ids=str)
def test_autocast_is_noted_and_goes_on_as_it_was(exact, dtype, error):
    model = llama()
    with torch.autocast("cpu", dtype=dtype), torch.no_grad():
        before = model(**BATCH, use_cache=False).last_hidden_state
        report = examine(model, BATCH)
        assert torch.is_autocast_enabled("cpu")
        assert torch.get_autocast_dtype("cpu") == dtype
        assert torch.equal(model(**BATCH, use_cache=False).last_hidden_state, before)
    name = str(dtype).removeprefix("torch.")
    assert report.about["dtype"] == "float32"
    assert any(note.startswith("under autocast:") and name in note for note in report.about["notes"])
    assert 0 < worst(report, exact) < error
    assert not any("autocast" in note for note in examine(model, BATCH, spectrum=False).about["notes"])


class Float8Linear(nn.Module):
    """Weights in an 8-bit float with one scale, cast in the forward: CPUs multiply no 8-bit floats."""

    def __init__(self, plain):
        super().__init__()
        scale = plain.weight.detach().abs().max() / torch.finfo(torch.float8_e4m3fn).max
        self.weight = nn.Parameter((plain.weight.detach() / scale).to(torch.float8_e4m3fn), requires_grad=False)
        self.register_buffer("scale", scale)

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale)


def test_weights_in_float8_are_run_and_said(exact):
    model = llama()
    for layer in model.layers:
        for name, child in list(layer.mlp.named_children()):
            if isinstance(child, nn.Linear):
                setattr(layer.mlp, name, Float8Linear(child))
    report = examine(model, BATCH)
    assert any("6 weights as float8_e4m3fn" in note for note in report.about["notes"])
    assert 0 < worst(report, exact) < 0.15


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_collapsed_stream_is_at_the_floor_of_its_dtype(dtype):
    model = llama(dtype)
    with torch.no_grad():
        for layer in model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.embed_tokens.weight.copy_(model.embed_tokens.weight[:1].expand(50, -1))
    report = examine(model, BATCH, spectrum=False)
    rows = report.rows.where(metric="residual", site="stream", part="out", layer=2).rows
    assert rows
    for row in rows:
        assert f"float floor of {str(dtype).removeprefix('torch.')}" in row.note
