"""Means over what each query sees: against loops, in precision, in memory, and under a compiler."""

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fullrank.edit import Call, Place
from fullrank.remedies.attention.visible_mean import Visible, visible_mean, visible_of

PLACE = Place("decoder", 1, "self", "attention")


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def call_of(q, k, v, **options):
    return Call(place=PLACE, kernel="scaled_dot_product_attention", query=q, key=k, value=v, **options)


def by_loops(call):
    """Σ over visible keys / their number, from the definition."""
    v = call.value.double()
    batch, heads = call.query.shape[:2]
    out = torch.zeros(batch, heads, call.queries, v.shape[3], dtype=torch.float64)
    mask = call.mask
    for b, h, t in itertools.product(range(batch), range(heads), range(call.queries)):
        seen = []
        for s in range(call.keys):
            there = mask is None or bool(mask.expand(batch, heads, call.queries, call.keys)[b, h, t, s] == 0) != (
                mask.dtype == torch.bool
            )
            if call.causal and s > t:
                there = False
            if call.window is not None and s <= t - call.window:
                there = False
            if there:
                seen.append(v[b, h // (heads // v.shape[1]), s])
        if seen:
            out[b, h, t] = torch.stack(seen).mean(0)
    return out


def masks(queries, keys):
    bits = torch.rand(2, 4, queries, keys, generator=torch.Generator().manual_seed(1)) < 0.6
    row = bits[:, :1, :1]
    return {
        "none": None,
        "padding": row,
        "padding, expanded": row.expand(2, 1, queries, keys),
        "padding of one for all": row[:1],
        "padding, added": torch.zeros(row.shape).double().masked_fill(~row, -torch.inf),
        "a row for every query": bits[:, :1],
        "a row for every query, added": (~bits[:, :1]).double() * torch.finfo(torch.float64).min,
        "of every head": bits,
        "padding of every head": bits[:, :, :1],
    }


SHAPES = [(7, 7), (3, 7), (7, 3), (1, 5)]


@pytest.mark.parametrize("kind", masks(1, 1))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_the_mean_over_the_keys_that_a_query_sees(shape, kind):
    """With and without causality and windows; fewer queries than keys, and more; heads that share values."""
    queries, keys = shape
    for causal, window, narrow in itertools.product((False, True), (None, 1, 2, 3, 9), (4, 2)):
        call = call_of(
            draw(2, 4, queries, 3),
            draw(2, narrow, keys, 3),
            draw(2, narrow, keys, 5, seed=2),
            mask=masks(queries, keys)[kind],
            causal=causal,
            window=window,
        )
        found = visible_mean(call).expand(2, 4, queries, 5)
        torch.testing.assert_close(found, by_loops(call), rtol=0, atol=1e-12, msg=f"{causal} {window} {narrow}")


def test_models_that_softmax_by_themselves_are_read_from_their_scores():
    logits = draw(2, 4, 6, 6).masked_fill(torch.ones(6, 6, dtype=torch.bool).triu(1), -torch.inf)
    call = Call(place=PLACE, kernel="softmax", value=draw(2, 2, 6, 3), logits=logits)
    expected = by_loops(call_of(draw(2, 4, 6, 1), draw(2, 2, 6, 1), call.value, causal=True))
    torch.testing.assert_close(visible_mean(call), expected)


LONG = {
    "full": {},
    "causal": {"causal": True},
    "window of 5": {"causal": True, "window": 5},
    "window of 1000": {"causal": True, "window": 1000},
    "looking ahead": {"window": 7},
    "causal and padded": {"causal": True, "mask": (torch.arange(4096) < 4000)[None, None, None]},
    "a row for every query": {"mask": torch.ones(4096, 4096, dtype=torch.bool).tril().triu(-30)[None, None]},
}


@pytest.mark.parametrize("kind", LONG)
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 4e-6), (torch.bfloat16, 0.008)])
def test_at_4096_tokens_sums_lose_nothing(kind, dtype, error):
    """Values with a common offset a hundred times their spread, relative to the offset; float32 throughout, and half
    precision but for the last rounding."""
    value = (100 + draw(1, 1, 4096, 4)).to(dtype)
    query = torch.zeros(1, 1, 4096, 4, dtype=dtype)
    found = visible_mean(call_of(query, query, value, **LONG[kind])).double()
    expected = visible_mean(call_of(query.double(), query.double(), value.double(), **LONG[kind]))
    assert float((found - expected).abs().max()) < error * 100


class Largest(TorchDispatchMode):
    """The largest tensor that is made."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        if isinstance(output, torch.Tensor):
            self.size = max(self.size, output.numel())
        return output


@pytest.mark.parametrize("kind", [kind for kind in LONG if kind != "a row for every query"])
def test_what_flags_and_padding_say_never_becomes_a_map(kind):
    value = torch.zeros(1, 2, 4096, 8)
    with Largest() as largest:
        visible_mean(call_of(value, value, value, **LONG[kind]))
    assert largest.size <= 2 * value.numel()


def test_a_mask_that_is_the_same_row_for_all_queries_is_told_by_its_strides():
    value = torch.zeros(2, 2, 64, 8)
    row = torch.ones(2, 1, 1, 64, dtype=torch.bool)
    assert visible_of(call_of(value, value, value, mask=row.expand(2, 1, 64, 64))).mask.shape == (2, 1, 1, 64)


@pytest.mark.parametrize("kind", ["causal", "window of 5", "causal and padded", "full"])
def test_a_compiler_sees_one_graph(kind):
    options = {**LONG[kind], **({"mask": LONG[kind]["mask"][..., :32]} if "mask" in LONG[kind] else {})}
    value = draw(1, 2, 32, 4, dtype=torch.float32)

    def run(value):
        return Visible(32, 32, options.get("mask"), options.get("causal", False), options.get("window")).mean(value)

    torch.testing.assert_close(torch.compile(run, fullgraph=True, backend="aot_eager")(value), run(value))


def test_gradients_are_those_of_the_mean():
    for options in ({}, {"causal": True}, {"causal": True, "window": 2}, {"mask": masks(5, 5)["padding"]}):
        v = draw(2, 1, 5, 2).requires_grad_()
        q = draw(2, 1, 5, 2)
        assert torch.autograd.gradcheck(lambda v: visible_mean(call_of(q, q, v, **options)), (v,))  # noqa: B023
