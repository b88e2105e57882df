"""Every streaming number equals the dense float64 value of the inputs as rounded to their dtype."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fullrank.metrics.rows import selectivity_from_summary
from fullrank.operators import AttentionOperator, Causal, Full, Padding, blocks
from operators.cases import MASKS, SQUARE, mask_cases
from oracles import attention as oracle

ROWS = ("log_sum_exp", "entropy", "inverse_participation", "max_logit", "logit_mean", "logit_std", "row_sum")


def assert_exact(found, expected, what, unit=1.0):
    """Within 1e-4 relative or 1e-6 units absolute, NaN where NaN."""
    assert found.shape == expected.shape, what
    assert torch.equal(found.isnan(), expected.isnan()), f"{what}: NaN in other places"
    error = (found.double() - expected).abs().nan_to_num()
    allowed = torch.maximum(1e-4 * expected.abs(), torch.tensor(1e-6 * unit, dtype=torch.float64)).nan_to_num(1.0)
    worst = (error / allowed).max() if error.numel() else 0.0
    assert worst <= 1, f"{what}: error {float(error.max()):.2e}, {float(worst):.1f} times what is allowed"


def check(query, key, mask, visible, **options):
    """Summary, column means of groups and selectivity against the oracle."""
    operator = AttentionOperator(query, key, mask=mask, **options)
    batch, _, queries, keys = operator.shape
    generator = torch.Generator().manual_seed(5)
    groups = torch.rand(2, batch, queries, generator=generator) < 0.5
    bias, sink = options.get("bias"), options.get("sink")
    if callable(bias):
        bias = bias(slice(0, queries), slice(0, keys))
    S = oracle.scores(query, key, scale=options.get("scale"), bias=bias, softcap=options.get("softcap"))
    A = oracle.attention(S, visible, sink)
    expected = oracle.row_statistics(S, A, visible, sink)
    everyone = torch.ones(batch, queries, dtype=torch.bool)
    summary = operator.summary()
    largest = max(1.0, float(S[visible].abs().max()) if visible.any() else 1.0)
    for name in ROWS:
        # a sum of logits is resolved no better than the logits are: float32 knows them to 6e-8 of their size
        unit = largest if name in ("log_sum_exp", "logit_mean", "logit_std") else 1.0
        assert_exact(getattr(summary, name), expected[name], name, unit)
    assert torch.equal(summary.visible, visible.sum(-1))
    assert_exact(summary.column_mean, oracle.column_mean(A, visible, everyone)[None], "column mean")
    grouped = operator.summary(groups=groups)
    assert_exact(
        grouped.column_mean,
        torch.stack([oracle.column_mean(A, visible, rows) for rows in groups]),
        "column means of groups",
    )
    assert torch.equal(grouped.entropy.nan_to_num(), summary.entropy.nan_to_num())
    column_mean = summary.column_mean.nan_to_num()
    mass = operator.visible_mass(column_mean)
    assert_exact(mass, (column_mean[:, :, :, None] * visible).sum(-1), "visible mass")
    if sink is None and visible.any(-1).any(-1).all():
        found = selectivity_from_summary(summary.entropy, column_mean[0], mass[0], visible.any(-1))
        assert_exact(found, oracle.selectivity(A, visible), "selectivity")


def tensors(batch, heads, key_heads, queries, keys, width=16, gain=1.0, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    query = gain * torch.randn(batch, heads, queries, width, generator=generator)
    key = torch.randn(batch, key_heads, keys, width, generator=generator)
    return query.to(dtype), key.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MASKS)
def test_the_summary_equals_the_definition_under_every_mask(name, dtype):
    mask, visible = mask_cases(2, 4, 23, 23)[name]
    check(*tensors(2, 4, 2, 23, 23, dtype=dtype), mask, visible)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_dtypes_are_summed_in_float32_at_least(dtype):
    mask, visible = mask_cases(2, 4, 23, 23)["causal"]
    query, key = tensors(2, 4, 2, 23, 23, dtype=dtype)
    check(query, key, mask, visible)
    assert AttentionOperator(query, key).dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("shape", [(2, 2, 9, 30), (1, 2, 30, 9), (1, 2, 1, 20), (2, 2, 1, 1), (1, 1, 20, 1)])
@pytest.mark.parametrize("name", [name for name in MASKS if name not in SQUARE])
def test_queries_and_keys_may_differ_in_number(name, shape):
    mask, visible = mask_cases(*shape)[name]
    batch, heads, queries, keys = shape
    check(*tensors(batch, heads, 1, queries, keys), mask, visible)


EXTRAS = {
    "bias": lambda s: {"bias": torch.randn(s[0], s[1], s[2], s[3], generator=torch.Generator().manual_seed(1))},
    "shared-bias": lambda s: {"bias": torch.linspace(-3, 0, s[3]).bfloat16()},
    "bias-by-blocks": lambda s: {"bias": alibi(s[1])},
    "bias-without-heads": lambda s: {"bias": lambda q, k: alibi(1)(q, k)[0]},
    "softcap": lambda s: {"softcap": 2.0},
    "sink": lambda s: {"sink": torch.linspace(-2, 4, s[1])},
    "far-sink": lambda s: {"sink": torch.full((s[1],), 60.0)},
    "everything": lambda s: {
        "bias": alibi(s[1]),
        "softcap": 5.0,
        "sink": torch.linspace(-2, 4, s[1]).bfloat16(),
        "scale": 0.3,
    },
}


def alibi(heads):
    slopes = 2.0 ** -torch.arange(1, heads + 1)

    def bias(queries, keys):
        t, s = torch.arange(queries.start, queries.stop), torch.arange(keys.start, keys.stop)
        return -slopes[:, None, None] * (t[:, None] - s).abs()

    return bias


@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("name", ["full", "causal", "causal&padding", "arbitrary", "padding-per-head"])
@pytest.mark.parametrize("entries", [blocks.BLOCK, 700])
def test_biases_caps_and_sinks_are_part_of_the_scores(name, extra, entries, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", entries)
    shape = (1, 4, 20, 20)
    mask, visible = mask_cases(*shape)[name]
    check(*tensors(1, 4, 2, 20, 20), mask, visible, **EXTRAS[extra](shape))


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("gain", [0.01, 8.0, 64.0])
def test_sharp_and_flat_logits_lose_no_accuracy(name, gain):
    mask, visible = mask_cases(1, 2, 40, 40)[name]
    check(*tensors(1, 2, 2, 40, 40, width=64, gain=gain), mask, visible)


@pytest.mark.parametrize("name", ["full", "causal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_queries_that_are_their_own_keys(name, dtype):
    mask, visible = mask_cases(1, 2, 96, 96)[name]
    query, _ = tensors(1, 2, 2, 96, 96, width=64, gain=1.5, dtype=dtype)
    check(query, query, mask, visible)


@pytest.mark.parametrize("name", ["full", "causal", "causal&padding"])
def test_a_direction_that_all_keys_share_costs_no_precision(name):
    mask, visible = mask_cases(2, 2, 48, 48)[name]
    query, key = tensors(2, 2, 2, 48, 48)
    check(query + 5, key + 40, mask, visible)


@settings(deadline=None, max_examples=25)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 2), st.integers(1, 3), st.integers(1, 20), st.integers(1, 20)),
    name=st.sampled_from([name for name in MASKS if name not in SQUARE]),
    entries=st.sampled_from([1, 50, 400, 1 << 20]),
    seed=st.integers(0, 2**20),
    gain=st.sampled_from([0.1, 1.0, 8.0]),
)
def test_no_shape_mask_or_block_size_changes_the_summary(shape, name, entries, seed, gain):
    batch, key_heads, group, queries, keys = shape
    mask, visible = mask_cases(batch, key_heads * group, queries, keys, seed=seed)[name]
    whole = blocks.BLOCK
    blocks.BLOCK = entries
    try:
        check(*tensors(batch, key_heads * group, key_heads, queries, keys, gain=gain, seed=seed), mask, visible)
    finally:
        blocks.BLOCK = whole


def test_long_and_short_maps_in_one_batch_of_tiles():
    """T = 512 takes several tiles and several blocks of rows."""
    mask, visible = mask_cases(2, 4, 512, 512)["causal&padding"]
    check(*tensors(2, 4, 2, 512, 512, width=32, gain=2.0), mask, visible)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "gain"), [(torch.float32, 1.0), (torch.float32, 8.0), (torch.bfloat16, 1.0)])
@pytest.mark.parametrize("name", MASKS)
def test_the_summary_equals_the_definition_at_two_thousand_tokens(name, dtype, gain):
    mask, visible = mask_cases(1, 1, 2048, 2048)[name]
    check(*tensors(1, 1, 1, 2048, 2048, width=64, gain=gain, dtype=dtype), mask, visible)


def test_hidden_keys_carry_no_mass_at_all():
    query, key = tensors(1, 2, 2, 20, 20, gain=30.0)
    real = (torch.arange(20) < 15)[None]
    summary = AttentionOperator(query, key, mask=Causal() & Padding(real)).summary()
    assert (summary.column_mean[..., 15:] == 0).all()
    assert torch.allclose(summary.column_mean.sum(-1), torch.ones(1, dtype=torch.float64), atol=1e-6)


def test_rows_that_see_nothing_are_undefined_and_enter_no_mean():
    query, key = tensors(1, 1, 1, 8, 8)
    real = (torch.arange(8) >= 3)[None]
    summary = AttentionOperator(query, key, mask=Causal() & Padding(real)).summary()
    assert summary.entropy[0, 0, :3].isnan().all()
    assert not summary.entropy[0, 0, 3:].isnan().any()
    assert torch.allclose(summary.column_mean.sum(-1), torch.ones((), dtype=torch.float64), atol=1e-6)
    nobody = torch.zeros(1, 1, 8, dtype=torch.bool)
    assert AttentionOperator(query, key, mask=Full()).summary(groups=nobody).column_mean.isnan().all()


def test_taking_a_summary_changes_neither_inputs_nor_random_state():
    query, key = tensors(2, 4, 2, 30, 30)
    query.requires_grad_()
    before = (query.detach().clone(), key.clone(), torch.get_rng_state())
    summary = AttentionOperator(query, key, mask=Causal()).summary()
    assert not summary.entropy.requires_grad
    assert query.grad is None
    for old, new in zip(before, (query, key, torch.get_rng_state()), strict=True):
        assert torch.equal(old, new)
