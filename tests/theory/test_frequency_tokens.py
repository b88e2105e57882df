"""What token reduction costs and what it does to attention, against counting and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from tests.golden import assert_golden

from fullrank.errors import TheoryError
from fullrank.theory.frequency_tokens import (
    Reduction,
    block_macs,
    high_frequency_score,
    pooled_mass,
    schedule_macs,
    tokens_after,
)

DEIT_TINY = {"depth": 12, "width": 192, "tokens": 197, "patch_inputs": 3 * 16 * 16, "classes": 1000}
FATR = (Reduction(4, 0.7, 4), Reduction(7, 0.7, 1), Reduction(10, 0.7, 1))


def test_the_cost_of_deit_tiny_unpruned_and_reduced():
    found = [schedule_macs(**DEIT_TINY, reductions=how)[0] / 1e9 for how in ((), FATR)]
    assert_golden("ft-macs-deit-tiny", found)
    assert schedule_macs(**DEIT_TINY, reductions=FATR)[1][:7] == (197, 197, 197, 197, 142, 142, 142)


@pytest.mark.parametrize(("width", "tokens"), [(16, 10), (24, 33)])
def test_a_block_costs_what_torch_counts(width, tokens):
    from torch.utils.flop_counter import FlopCounterMode

    x = torch.randn(tokens, width)
    weights = [torch.randn(width, width) for _ in "qkvo"]
    up, down = torch.randn(width, 4 * width), torch.randn(4 * width, width)
    with FlopCounterMode(display=False) as counted:
        q, k, v = (x @ weight for weight in weights[:3])
        x = ((q @ k.T).softmax(1) @ v) @ weights[3]
        _ = torch.relu(x @ up) @ down
    assert float(block_macs(tokens, width=width)) == counted.get_total_flops() / 2
    alone = block_macs(np.array([tokens, 2 * tokens]), width=width, after=tokens)
    assert alone.shape == (2,)
    assert alone[0] == block_macs(tokens, width=width)


def test_a_schedule_must_name_blocks_that_are_there():
    for wrong in ((Reduction(13, 0.5),), (Reduction(2, 0.5), Reduction(2, 0.6)), (Reduction(2, 0.0),)):
        with pytest.raises(TheoryError, match="reductions="):
            schedule_macs(**DEIT_TINY, reductions=wrong)
    assert tokens_after(11, Reduction(1, 0.7)) == 8  # .7 · 10 is 7, whatever floating point makes of it
    assert tokens_after(3, Reduction(1, 1.0, pooled=4)) == 3


def test_the_score_is_the_mean_attention_received():
    generator = torch.Generator().manual_seed(0)
    for count in (12, 40):
        maps = torch.randn(3, count, count, generator=generator, dtype=torch.float64).softmax(-1).numpy()
        score = high_frequency_score(maps)
        naive = (maps - np.full((count, count), 1 / count)).sum(-2) / count  # column sums of A − J, entry by entry
        assert_golden("ft-score-equivalence", float(np.abs(score - (maps.mean(-2) - 1 / count)).max()))
        assert score == pytest.approx(naive, abs=1e-15)
        assert (score.argsort() == maps.mean(-2).argsort()).all()


@pytest.mark.parametrize(("group", "width"), [(32, 16), (8, 64)])
def test_a_pooled_token_gets_what_the_softmax_of_its_mean_key_gives(group, width):
    generator = np.random.default_rng(1)
    keys, query = generator.normal(size=(4000, group, width)), generator.normal(size=(4000, width))
    logits = np.einsum("bmd,bd->bm", keys, query)
    mean_key = np.einsum("bd,bd->b", keys.mean(1), query)
    mass = np.exp(mean_key) / np.exp(logits).sum(1)
    assert pooled_mass(logits) == pytest.approx(mass)
    assert pooled_mass(logits, size_bias=True) == pytest.approx(group * mass)
    assert float(pooled_mass(logits).max()) <= 1 / group
    if (group, width) == (32, 16):
        # logits as attention has them, divided by √d: the ratio of the masses, not the mean of ratios
        scaled = logits / math.sqrt(width)
        assert_golden("ft-jensen-gap", [float(pooled_mass(scaled, size_bias=bias).mean()) for bias in (False, True)])


def test_sums_of_logits_are_a_weak_stand_in_for_column_means():
    generator = np.random.default_rng(2)
    found = []
    for _ in range(8):
        q, k = generator.normal(size=(2, 196, 64))
        logits = q @ k.T
        maps = np.exp(logits / 8)
        columns = (maps / maps.sum(1, keepdims=True)).mean(0)
        found.append(stats.spearmanr(logits.sum(0), columns).statistic)
    assert_golden("ft-flash-proxy", float(np.mean(found)))


def test_copies_of_two_opposite_tokens_raise_what_is_not_the_mean():
    token = np.array([4 / math.sqrt(2), 0.0])  # two tokens ±x: their centred norm is √2 ‖x‖ = 4
    pair = np.stack([token, -token])
    copies = np.repeat(pair, 5, axis=0)
    centred = [np.linalg.norm(x - x.mean(0)) for x in (pair, copies)]
    assert centred[0] == pytest.approx(4)
    assert_golden("ft-prop31-counterexample", float(centred[1]))
