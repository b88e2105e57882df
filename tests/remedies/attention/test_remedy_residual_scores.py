"""RealFormer's scores against running sums and means of dense ones, and how logits grow with them."""

import kinds
import pytest
import torch
from attending import MASKS, dense_softmax, repaired_and_seen
from carrying import check, check_decoding, check_repeated_blocks, raw_scores, refuses
from remedy_patients import Case, build

import fullrank
from fullrank.errors import RemedyError
from fullrank.zoo import Transformer, TransformerConfig


def running_sum(n, layers):
    return [1.0] * n


def running_mean(n, layers):
    return [1 / n] * n


@pytest.mark.parametrize("mask", MASKS)
def test_scores_are_added_up(mask):
    case = MASKS[mask]()
    with repaired_and_seen(case, "residual-scores") as (_, calls):
        check(mask, case, calls(), running_sum)


@pytest.mark.parametrize("mask", ["full", "causal, explicit softmax", "biased"])
def test_scores_are_averaged(mask):
    case = MASKS[mask]()
    with repaired_and_seen(case, "residual-scores", kind="mean") as (_, calls):
        check(mask, case, calls(), running_mean)


def test_the_oldest_layers_are_cut_off_within_the_tolerance():
    case = build("llama_padded")
    with repaired_and_seen(case, "residual-scores", kind="mean", tolerance=0.4) as (repair, calls):
        check("causal and padded", case, calls(), lambda n, _: [0.0 if n == 3 and j == 0 else 1 / n for j in range(n)])
    assert "sees the scores of 2; the weights of those left out add up to ε = 0.33" in repair.notes[0]


def test_repeated_blocks_have_the_gradients_of_others():
    kind = kinds.build("llama")
    case = Case(kind.model, kind.batch, 3)
    check_repeated_blocks(case, lambda: fullrank.repair(kind.model, "residual-scores", batch=case.batch))


def test_decoding_with_a_cache():
    kind = kinds.build("llama")
    check_decoding(kind.model, lambda: fullrank.repair(kind.model, "residual-scores", batch=kind.batch))


def test_sums_of_layers_make_maps_sharper_and_means_make_them_flatter():
    """Of independent layers the spread of scores grows as √ℓ, or falls as 1/√ℓ."""
    config = TransformerConfig(kind="encoder", depth=8, width=64, heads=4, positions="none")
    model = Transformer(config, seed=1).double().eval()
    x = torch.randn(1, 48, 64, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    case = Case(model, {"inputs_embeds": x}, 8)
    entropies = {}
    for kind, counts in (("sum", running_sum), ("mean", running_mean)):
        with repaired_and_seen(case, "residual-scores", kind=kind) as (_, calls):
            seen = calls()
        h = sum(c * raw_scores(one) for c, one in zip(counts(8, 8), seen, strict=True))
        A = dense_softmax(h)
        entropies[kind] = float(-(A * A.clamp(min=1e-300).log()).sum(-1).mean())
        alone = seen[-1].A
        plain = float(-(alone * alone.log()).sum(-1).mean())
        assert (entropies[kind] < plain - 0.5) if kind == "sum" else (entropies[kind] > plain)
    assert entropies["sum"] < entropies["mean"] - 1


def test_refusals():
    batch = {"input_ids": torch.arange(9)[None]}
    one = Transformer(TransformerConfig(kind="decoder", depth=1, width=16, heads=4), seed=0)
    refuses(one, "residual-scores", "residual-scores needs two layers of self-attention", batch)
    model = Transformer(TransformerConfig(kind="decoder", depth=2, width=16, heads=4), seed=0)
    for wrong in ("kind=median", "keep=0", "tolerance=-1"):
        with pytest.raises(RemedyError, match=wrong.partition("=")[0]):
            fullrank.repair(model, f"residual-scores?{wrong}", batch=batch)
