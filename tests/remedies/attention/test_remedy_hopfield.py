"""Hopfield averaging against its recursion on dense scores, its life, and what it does to attention without skips."""

import kinds
import pytest
import torch
from attending import MASKS, repaired_and_seen
from carrying import (
    check,
    check_compiled,
    check_decoding,
    check_repeated_blocks,
    checkpointed,
    refuses,
    without_skips,
)
from remedy_patients import Case, build

import fullrank
from fullrank.errors import EditError, RemedyError
from fullrank.zoo import Transformer, TransformerConfig
from golden import assert_golden


def counts(average, start="zero", keep=None):
    def of(n, layers):
        c = [average ** (n - j) * (1.0 if j == 1 and start == "first" else 1 - average) for j in range(1, n + 1)]
        return [0.0 if keep is not None and j < n - keep else one for j, one in enumerate(c)]

    return of


@pytest.mark.parametrize("mask", MASKS)
def test_scores_are_averaged_across_layers(mask):
    case = MASKS[mask]()
    with repaired_and_seen(case, "hopfield") as (_, calls):
        check(mask, case, calls(), counts(0.5))


@pytest.mark.parametrize("options", [{"start": "first", "average": 0.7}, {"keep": 2}, {"keep": 1, "average": 0.2}])
@pytest.mark.parametrize("mask", ["causal and padded", "causal, explicit softmax"])
def test_start_and_number_of_layers(mask, options):
    case = MASKS[mask]()
    with repaired_and_seen(case, "hopfield", **options) as (_, calls):
        check(mask, case, calls(), counts(**{"average": 0.5} | options))


def test_a_block_that_is_called_several_times_carries_from_call_to_call():
    kind = kinds.build("albert")
    case = Case(kind.model, kind.batch, 3)
    with repaired_and_seen(case, "hopfield") as (_, calls):
        check("full", case, calls(), counts(0.5))


def test_what_is_left_out_is_said():
    case = build("gpt2")
    with fullrank.repair(case.model, "hopfield", batch=case.batch, tolerance=0.3, average=0.25) as repair:
        (note,) = repair.notes
        assert "the last of 3 layers of decoder sees the scores of 1" in note
        assert "ε = 0.23" in note  # .75 (.0625 + .25)
    with fullrank.repair(case.model, "hopfield", batch=case.batch, keep=3) as repair:
        assert not repair.notes


def test_the_kernel_stays_where_it_was():
    case = build("zoo_decoder")
    with fullrank.repair(case.model, "hopfield", batch=case.batch), torch.no_grad(), torch.profiler.profile() as seen:
        case()
    used = [event.key for event in seen.key_averages() for _ in range(event.count)]
    assert used.count("aten::_scaled_dot_product_flash_attention_for_cpu") == 3
    assert "aten::_softmax" not in used


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("patient", ["gpt2", "torch_encoder", "vit"])
def test_the_skip_reaches_what_attention_is_added_to(patient):
    case = build(patient)
    first = {}
    for name in ("hopfield?average=0&skip=1", "hopfield?average=0&skip=0"):
        with fullrank.repair(case.model, name, batch=case.batch), torch.no_grad():
            first[name] = case()
    assert not torch.allclose(*first.values(), atol=1e-3)


def test_the_skip_by_hand():
    model = Transformer(TransformerConfig(kind="decoder", depth=2, width=16, heads=2, mlp_width=0), seed=0).double()
    ids = torch.arange(9)[None]
    with fullrank.repair(model, "hopfield?average=0&skip=0.3", batch={"input_ids": ids}), torch.no_grad():
        found = model(input_ids=ids).logits
    with torch.no_grad():
        X = model.embedding(ids)
        for block in model.blocks:
            X = 0.3 * X + 0.7 * block.attention(X)
        torch.testing.assert_close(found, model.head(model.final_norm(X)), rtol=0, atol=1e-12)


# ---------------------------------------------------------------- life


@pytest.mark.parametrize("name", ["gpt2", *(pytest.param(one, marks=pytest.mark.slow) for one in ("llama", "bert"))])
def test_repeated_blocks_have_the_gradients_of_others(name):
    kind = kinds.build(name)
    for module in kind.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    case = Case(kind.model, kind.batch, 3)
    check_repeated_blocks(case, lambda: fullrank.repair(kind.model, "hopfield", batch=case.batch))


def test_checkpointing_with_reentrance_is_refused():
    kind = kinds.build("gpt2")
    kind.model.train()
    checkpointed(kind.model, reentrant=True)
    with (
        fullrank.repair(kind.model, "hopfield", batch=kind.batch),
        pytest.raises(EditError, match="use_reentrant=False"),
    ):
        kind.model(**kind.batch)[0].sum().backward()


@pytest.mark.slow
def test_one_graph():
    case = build("zoo_decoder")
    check_compiled(case, lambda: fullrank.repair(case.model, "hopfield", batch=case.batch))


def test_decoding_with_a_cache():
    kind = kinds.build("llama")
    check_decoding(kind.model, lambda: fullrank.repair(kind.model, "hopfield", batch=kind.batch))


def test_half_precision():
    case = build("zoo_decoder")
    case.model.float()
    with fullrank.repair(case.model, "hopfield", batch=case.batch), torch.no_grad():
        wanted = case()
        case.model.bfloat16()
        torch.testing.assert_close(case().float(), wanted, rtol=0.1, atol=0.15 * float(wanted.abs().max()))


def test_refusals():
    batch = {"input_ids": torch.arange(9)[None]}
    one = Transformer(TransformerConfig(kind="decoder", depth=1, width=16, heads=4), seed=0)
    refuses(one, "hopfield", "hopfield needs two layers of self-attention in a row, and this model has one", batch)
    config = TransformerConfig(kind="decoder", depth=3, width=16, heads=4)
    mixed = Transformer(config, seed=0)
    mixed.blocks[2].attention.inner.config = config.with_(heads=2)
    refuses(mixed, "hopfield", r"their heads \(queries, keys\) differ \(self\): \(4, 4\) in layer 1, \(2, 2\)", batch)
    model = Transformer(config, seed=0)
    for wrong in ("average=1.5", "average=-0.1", "keep=0", "tolerance=2", "start=second", "skip=-1"):
        with pytest.raises(RemedyError, match=wrong.partition("=")[0]):
            fullrank.repair(model, f"hopfield?{wrong}", batch=batch)


# ---------------------------------------------------------------- what it is for


def test_attention_without_skips_collapses_a_little_later():
    plain = without_skips(None, norm=False, depth=4)
    assert_golden("ha-attention-only-standard", plain[:2])
    assert plain[3] < 1e-6
    mha = without_skips("hopfield", norm=False, depth=4)
    assert_golden("ha-mha-h0", mha[[0, 1, 3]])
    assert mha[1] > 2 * plain[1]


def test_attention_without_skips_after_a_norm():
    plain = without_skips(None, norm=True, depth=4)
    assert_golden("ha-attention-only-standard-preln", plain[:2])
    assert plain[3] < 1e-6
    assert_golden("ha-mha-h0-preln", without_skips("hopfield", norm=True, depth=4)[[0, 1, 3]])


LAYERS = [0, 1, 3, 7, 11]


def test_with_a_skip_averaging_adds_nothing():
    plain = without_skips("hopfield?average=0&skip=0.5", norm=False, skip_scale=1.0)[LAYERS]
    mha = without_skips("hopfield?skip=0.5", norm=False, skip_scale=1.0)[LAYERS]
    torch.testing.assert_close(mha, plain, rtol=0.05, atol=0)
    for one in (plain, mha):  # the card's numbers where seeds agree; at layer 12 the range of ten seeds
        torch.testing.assert_close(one[:3], torch.tensor([0.985, 0.97, 0.90], dtype=one.dtype), rtol=0.15, atol=0)
        assert 0.07 < one[-1] < 0.16


def test_with_a_skip_and_a_norm_averaging_adds_nothing():
    plain = without_skips("hopfield?average=0&skip=0.5", norm=True, skip_scale=1.0)
    mha = without_skips("hopfield?skip=0.5", norm=True, skip_scale=1.0)
    assert_golden("ha-skip-standard-preln", plain[LAYERS])
    assert_golden("ha-skip-mha-preln", mha[LAYERS])
