"""What a mask hides is not seen: theorems about logits, whichever way attention is computed."""

import pytest
import torch
from naive_zoo import batch_for, shaken

from fullrank.zoo import StateSpace, StateSpaceConfig, Transformer, TransformerConfig

SMALL = {"depth": 2, "width": 8, "heads": 2, "vocabulary": 11, "context": 16}
WAYS = ["fused", "explicit"]


def transformer(**options):
    return shaken(Transformer(TransformerConfig(**SMALL | options)))


def state_space(**options):
    return shaken(StateSpace(StateSpaceConfig(depth=2, width=6, states=3, vocabulary=11, **options)))


def changed_at(model, place, tokens=9):
    """At which tokens logits change when one token of the input does."""
    ids = batch_for(model.config, sequences=1, tokens=tokens)["input_ids"]
    other = ids.clone()
    other[0, place] = (other[0, place] + 1) % model.config.vocabulary
    moved = (model(input_ids=other).logits - model(input_ids=ids).logits).abs().amax((0, 2))
    return [t for t in range(tokens) if moved[t] > 1e-9]


CAUSAL = [
    *[pytest.param(lambda way=way: transformer(kind="decoder", attention=way), id=way) for way in WAYS],
    pytest.param(lambda: transformer(kind="decoder", positions="rotary", parallel=True), id="rotary"),
    pytest.param(state_space, id="state space"),
    pytest.param(lambda: state_space(write="convex", gate=False), id="state space, convex"),
]


@pytest.mark.parametrize("make", CAUSAL)
def test_a_causal_model_never_looks_ahead(make):
    assert changed_at(make(), 5) == [5, 6, 7, 8]


@pytest.mark.parametrize("way", WAYS)
def test_a_full_mask_lets_every_token_see_every_other(way):
    assert changed_at(transformer(attention=way), 5) == list(range(9))


@pytest.mark.parametrize("way", WAYS)
def test_windows_reach_as_far_as_layers_carry_them(way):
    sliding = transformer(kind="decoder", window=3, attention=way)  # two layers, two tokens back each
    assert changed_at(sliding, 2) == [2, 3, 4, 5, 6]
    both = transformer(kind="encoder", window=3, attention=way)  # one token to either side each
    assert changed_at(both, 4) == [2, 3, 4, 5, 6]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_a_window_as_wide_as_the_sequence_hides_nothing(kind, way):
    ids = batch_for(transformer().config, tokens=9)
    plain, windowed = (transformer(kind=kind, attention=way, window=window) for window in (None, 17))
    torch.testing.assert_close(plain(**ids).logits, windowed(**ids).logits, rtol=0, atol=1e-12)


PADDED = [
    *[
        pytest.param(lambda kind=kind, way=way: transformer(kind=kind, attention=way), id=f"{kind} {way}")
        for kind in ("encoder", "decoder")
        for way in WAYS
    ],
    pytest.param(lambda: transformer(window=3), id="window"),
    pytest.param(state_space, id="state space"),
]


@pytest.mark.parametrize("make", PADDED)
def test_padding_on_the_right_changes_nothing(make):
    model = make()
    ids = batch_for(model.config, tokens=9)["input_ids"]
    mask = torch.ones_like(ids)
    mask[:, 6:] = 0
    torch.testing.assert_close(
        model(input_ids=ids, attention_mask=mask).logits[:, :6], model(input_ids=ids[:, :6]).logits, rtol=0, atol=1e-12
    )


@pytest.mark.parametrize(
    "make",
    [
        *[
            pytest.param(lambda way=way: transformer(kind="decoder", positions="rotary", attention=way), id=way)
            for way in WAYS
        ],
        pytest.param(lambda: transformer(positions="rotary"), id="encoder"),
        pytest.param(lambda: transformer(kind="decoder", positions="none", window=4), id="window"),
        pytest.param(state_space, id="state space"),
    ],
)
def test_padding_on_the_left_changes_nothing_where_distances_are_all_that_counts(make):
    model = make()
    ids = batch_for(model.config, tokens=9)["input_ids"]
    mask = torch.ones_like(ids)
    mask[:, :3] = 0
    padded = model(input_ids=ids, attention_mask=mask).logits
    assert bool(padded.isfinite().all())
    torch.testing.assert_close(padded[:, 3:], model(input_ids=ids[:, 3:]).logits, rtol=0, atol=1e-12)


def test_without_positions_an_encoder_does_not_know_the_order_of_its_tokens():
    model = transformer(positions="none")
    ids = batch_for(model.config, tokens=9)["input_ids"]
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    found = model(input_ids=ids[:, order]).logits
    torch.testing.assert_close(found, model(input_ids=ids).logits[:, order], rtol=0, atol=1e-12)
    assert not torch.allclose(
        transformer()(input_ids=ids[:, order]).logits, transformer()(input_ids=ids).logits[:, order], atol=1e-3
    )


@pytest.mark.parametrize("make", [*CAUSAL, *PADDED])
def test_sequences_do_not_see_each_other(make):
    model = make()
    ids = batch_for(model.config, sequences=3, tokens=9)["input_ids"]
    together = model(input_ids=ids).logits
    alone = torch.cat([model(input_ids=ids[b : b + 1]).logits for b in range(3)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)
