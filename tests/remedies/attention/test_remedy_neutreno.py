"""NeuTRENO against its formula on dense maps, its life, and attention alone that does not collapse with it."""

import kinds
import pytest
import torch
from attending import MASKS, real_rows, repaired_and_seen, tolerance
from carrying import check_decoding, check_repeated_blocks, refuses, without_skips
from remedy_patients import Case

import fullrank
from fullrank.errors import RemedyError
from fullrank.zoo import Transformer, TransformerConfig
from golden import assert_golden


@pytest.mark.parametrize("strength", [0.6, 0.25])
@pytest.mark.parametrize("mask", MASKS)
def test_what_was_lost_of_the_first_values_is_added(mask, strength):
    case = MASKS[mask]()
    with repaired_and_seen(case, "neutreno", strength=strength) as (_, calls):
        firsts = {}
        for call in [call for call in calls() if call.part == "self"]:
            first = firsts.setdefault(call.stack, call)
            expected = call.A @ call.v + strength * (first.v - call.v)
            rows = real_rows(case, call)
            torch.testing.assert_close(call.output[rows], expected[rows], rtol=0, atol=tolerance(mask))


def test_repeated_blocks_have_the_gradients_of_others():
    kind = kinds.build("llama")
    case = Case(kind.model, kind.batch, 3)
    check_repeated_blocks(case, lambda: fullrank.repair(kind.model, "neutreno", batch=case.batch))


def test_decoding_with_a_cache():
    kind = kinds.build("llama")
    check_decoding(kind.model, lambda: fullrank.repair(kind.model, "neutreno", batch=kind.batch))


def test_attention_alone_keeps_its_tokens_apart():
    assert without_skips(None, norm=False, depth=4)[-1] < 1e-6
    bare, normed = (without_skips("neutreno", norm=norm)[-1] for norm in (False, True))
    assert_golden("of-neutreno", [float(bare), float(normed)])


def test_refusals():
    batch = {"input_ids": torch.arange(9)[None]}
    config = TransformerConfig(kind="decoder", depth=2, width=16, heads=4)
    refuses(Transformer(config.with_(depth=1), seed=0), "neutreno", "needs two layers", batch)
    for wrong in ("strength=-1", "strength=11"):
        with pytest.raises(RemedyError, match="strength"):
            fullrank.repair(Transformer(config, seed=0), f"neutreno?{wrong}", batch=batch)
