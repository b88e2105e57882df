"""Value residuals against their formula on dense maps; their life; what they keep and what they do not."""

import kinds
import pytest
import torch
from attending import MASKS, real_rows, repaired_and_seen, tolerance
from carrying import check_decoding, check_repeated_blocks, refuses, without_skips
from remedy_patients import Case, build

import fullrank
from fullrank.errors import RemedyError
from fullrank.zoo import Transformer, TransformerConfig


def check(mask, case, calls, mix):
    own = [call for call in calls if call.part == "self"]
    firsts = {}
    for call in own:
        first = firsts.setdefault(call.stack, call)
        one, two = (0.0, 1.0) if call is first else mix(call)
        expected = call.A @ (one * first.v + two * call.v)
        rows = real_rows(case, call)
        torch.testing.assert_close(call.output[rows], expected[rows], rtol=0, atol=tolerance(mask))


@pytest.mark.parametrize("mask", MASKS)
def test_learnt_numbers_mix_the_first_values_in(mask):
    case = MASKS[mask]()
    with repaired_and_seen(case, "value-residual") as (repair, calls):
        numbers = [p.detach() for n, p in case.model.named_parameters() if n.endswith("value_residual_before.mix")]
        seen = calls()
        later = [call for call in seen if call.part == "self" and call.layer > 1]
        assert len(numbers) == len(later) == repair.parameters / 2
        of = {(call.stack, call.layer): pair for call, pair in zip(later, numbers, strict=True)}
        check(mask, case, seen, lambda call: of[call.stack, call.layer])


@pytest.mark.parametrize("mask", ["causal and padded", "causal, explicit softmax"])
@pytest.mark.parametrize(
    ("options", "mix"), [({}, (0.5, 0.5)), ({"first": 2.0}, (2.0, 0.5)), ({"own": 1.0}, (0.5, 1.0))]
)
def test_fixed_numbers(mask, options, mix):
    case = MASKS[mask]()
    with repaired_and_seen(case, "value-residual", kind="fixed", **options) as (repair, calls):
        assert repair.parameters == 0
        check(mask, case, calls(), lambda call: mix)


def test_a_block_that_is_called_several_times_keeps_the_values_of_its_first_call():
    kind = kinds.build("albert")
    case = Case(kind.model, kind.batch, 3)
    with repaired_and_seen(case, "value-residual") as (repair, calls):
        assert repair.parameters == 2
        (mix,) = [p.detach() for n, p in case.model.named_parameters() if n.endswith("mix")]
        check("full", case, calls(), lambda call: mix)


def test_repeated_blocks_have_the_gradients_of_others():
    kind = kinds.build("llama")
    case = Case(kind.model, kind.batch, 3)
    check_repeated_blocks(case, lambda: fullrank.repair(kind.model, "value-residual?first=0.4", batch=case.batch))


def test_decoding_with_a_cache():
    kind = kinds.build("llama")
    check_decoding(kind.model, lambda: fullrank.repair(kind.model, "value-residual?kind=fixed", batch=kind.batch))


def test_later_layers_remember_their_tokens_and_attention_alone_collapses_all_the_same():
    """With a skip the last state holds more of the difference between tokens; without one it holds nothing."""
    plain = without_skips(None, norm=True, skip_scale=1.0)
    kept = without_skips("value-residual?kind=fixed", norm=True, skip_scale=1.0)
    assert kept[-1] > 1.1 * plain[-1]
    assert without_skips("value-residual?kind=fixed", norm=False, depth=4)[-1] < 1e-5


def test_refusals():
    batch = {"input_ids": torch.arange(9)[None]}
    config = TransformerConfig(kind="decoder", depth=2, width=16, heads=4)
    mixed = Transformer(config, seed=0)
    mixed.blocks[1].attention.inner.config = config.with_(heads=2)
    refuses(mixed, "value-residual", "their heads", batch)
    for wrong in ("kind=half", "first=11", "own=-11"):
        with pytest.raises(RemedyError, match=wrong.partition("=")[0]):
            fullrank.repair(Transformer(config, seed=0), f"value-residual?{wrong}", batch=batch)


def test_low_precision_keeps_the_identity():
    case = build("zoo_decoder")
    case.model.bfloat16()
    with torch.no_grad():
        before = case()
        with fullrank.repair(case.model, "value-residual", batch=case.batch):
            assert torch.equal(case(), before)
