"""A mask says the same in every way it can be asked, and recognising one never changes what it says."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fullrank.errors import ShapeError
from fullrank.operators import (
    Arbitrary,
    Causal,
    Full,
    Intervals,
    Packed,
    Padding,
    SlidingWindow,
    from_additive,
    recognise,
)
from operators.cases import MASKS, SQUARE, mask_cases

SHAPES = [(2, 3, 17, 17), (2, 1, 6, 19), (1, 2, 19, 6), (3, 2, 1, 1), (2, 2, 1, 8)]


def every_case():
    return [
        pytest.param(shape, name, id=f"{name}-{'x'.join(map(str, shape))}")
        for shape in SHAPES
        for name in MASKS
        if shape[2] == shape[3] or name not in SQUARE
    ]


@pytest.mark.parametrize(("shape", "name"), every_case())
def test_a_mask_equals_its_predicate_in_blocks_counts_and_ranges(shape, name):
    mask, visible = mask_cases(*shape)[name]
    assert torch.equal(mask.dense(shape).expand(shape), visible)
    assert torch.equal(mask.visible_count(shape).expand(shape[:3]), visible.sum(-1))
    for start in range(0, shape[2], 4):
        rows = slice(start, min(start + 4, shape[2]))
        span = mask.spans([rows], shape)[0]
        assert (span.start, span.stop) == mask.key_range(rows, shape)
        outside = visible[:, :, rows].clone()
        outside[..., span.start : span.stop] = False
        assert not outside.any(), "a visible key lies outside the range"
        assert visible[:, :, rows, span.clear_start : span.clear_stop].all(), "a hidden key lies in the clear range"
        keys = slice(shape[3] // 3, shape[3])
        block = mask.block(rows, keys, shape)
        found = torch.ones((), dtype=torch.bool) if block is None else block
        assert torch.equal(found.expand(visible[:, :, rows, keys].shape), visible[:, :, rows, keys])


@pytest.mark.parametrize(("shape", "name"), every_case())
def test_selecting_sequences_and_heads_selects_the_predicate(shape, name):
    mask, visible = mask_cases(*shape)[name]
    batch, heads = slice(shape[0] - 1, shape[0]), slice(0, 1)
    part = (1, 1, *shape[2:])
    assert torch.equal(mask.select(batch, heads).dense(part).expand(part), visible[batch, heads])


@pytest.mark.parametrize("name", [name for name in MASKS if name != "window-cache"])
def test_a_causal_mask_is_one_under_which_nobody_looks_ahead(name):
    mask, visible = mask_cases(2, 2, 12, 12)[name]
    if mask.is_causal:
        assert not visible.triu(1).any()
    if name in ("causal", "window", "causal&padding", "causal&block-local", "packed&causal", "all&"):
        assert mask.is_causal


@pytest.mark.parametrize(("shape", "name"), every_case())
def test_recognising_a_mask_never_changes_what_it_says(shape, name):
    _, visible = mask_cases(*shape)[name]
    assert torch.equal(recognise(visible).dense(shape).expand(shape), visible)


@settings(deadline=None, max_examples=60)
@given(
    st.tuples(st.integers(1, 2), st.integers(1, 2), st.integers(1, 7), st.integers(1, 7)),
    st.integers(0, 2**20),
    st.sampled_from([0.2, 0.5, 0.9, 1.0]),
)
def test_recognising_any_visibility_is_exact(shape, seed, density):
    visible = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < density
    assert torch.equal(recognise(visible).dense(shape).expand(shape), visible)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("full", Full),
        ("causal", Causal),
        ("window", SlidingWindow),
        ("padding", Padding),
        ("padding-per-head", Padding),
        ("packed", Intervals),
        ("block-local", Intervals),
        ("prefix-per-sequence", Intervals),
        ("arbitrary", Arbitrary),
    ],
)
def test_the_usual_masks_are_recognised_by_name(name, kind):
    _, visible = mask_cases(2, 3, 17, 17)[name]
    assert isinstance(recognise(visible), kind)


def test_causal_with_padding_is_recognised_as_such():
    shape = (2, 3, 17, 17)
    _, visible = mask_cases(*shape)["causal&padding"]
    parts = recognise(visible).parts
    assert {type(part) for part in parts} == {Causal, Padding}
    assert recognise(visible[:, :1]).is_causal
    cached = torch.ones(4, 9, dtype=torch.bool).tril(5)
    assert recognise(cached) == Causal(5)


def test_a_broadcast_mask_is_recognised_without_being_expanded():
    real = torch.arange(9)[None] < torch.tensor([[5], [9]])
    mask = recognise(real[:, None, None].expand(2, 4, 9, 9))
    assert isinstance(mask, Padding)
    assert mask.real.shape == (2, 9)
    assert isinstance(recognise(torch.ones(1, 1, 5, 5, dtype=torch.bool)), Full)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("lowest", ["finfo", "inf"])
def test_an_additive_mask_is_split_into_visibility_and_bias(dtype, lowest):
    hidden = torch.finfo(dtype).min if lowest == "finfo" else -torch.inf
    _, visible = mask_cases(2, 1, 9, 9)["causal&padding"]
    mask, bias = from_additive(torch.zeros(visible.shape, dtype=dtype).masked_fill(~visible, hidden))
    assert bias is None
    assert torch.equal(mask.dense((2, 1, 9, 9)).expand(visible.shape), visible)
    slope = -torch.arange(9, dtype=dtype) / 4
    mask, bias = from_additive(slope.expand(2, 1, 9, 9).masked_fill(~visible, hidden))
    assert torch.equal(mask.dense((2, 1, 9, 9)).expand(visible.shape), visible)
    assert torch.equal(bias, torch.where(visible, slope, 0))


def test_contiguous_documents_cost_intervals_and_others_a_pattern():
    assert Packed(torch.tensor([[0, 0, 1, 1, 2]])).plain
    assert not Packed(torch.tensor([[0, 1, 0]])).plain


@pytest.mark.parametrize(
    "ask",
    [
        lambda: SlidingWindow(0),
        lambda: Padding(torch.ones(2, 5, dtype=torch.bool)).visible_count((2, 1, 4, 6)),
        lambda: Packed(torch.zeros(1, 5, dtype=torch.long)).visible_count((1, 1, 4, 5)),
        lambda: Arbitrary(torch.ones(4, 5, dtype=torch.bool)).visible_count((1, 1, 4, 6)),
        lambda: Arbitrary(torch.ones(1, 1, 1, 4, 5, dtype=torch.bool)),
        lambda: recognise(torch.ones(())),
    ],
)
def test_a_mask_that_does_not_fit_is_refused_in_one_sentence(ask):
    with pytest.raises(ShapeError):
        ask()


@pytest.mark.parametrize(("shape", "name"), every_case())
@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_the_mask_of_the_first_tokens_is_the_corner_of_the_predicate(shape, name, tokens):
    mask, visible = mask_cases(*shape)[name]
    corner = visible[:, :, :tokens, :tokens]
    assert torch.equal(mask.leading(tokens).dense(corner.shape).expand(corner.shape), corner)
