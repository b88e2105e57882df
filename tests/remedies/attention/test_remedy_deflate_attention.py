"""Deflated attention against singular value decompositions of dense maps."""

import pytest
import torch
from attending import MASKS, real_rows, repaired_and_seen
from attention_only import AttentionOnly

import fullrank
from fullrank import metrics
from fullrank.errors import RemedyError
from fullrank.remedies.attention.deflate_attention import leading_left_vectors


@pytest.mark.parametrize("mask", ["full", "padded", "biased"])
@pytest.mark.parametrize(("k", "strength"), [(1, 1.0), (3, 0.5)])
def test_leading_triplets_are_taken_out_of_the_map(k, strength, mask):
    case = MASKS[mask]()
    with repaired_and_seen(case, "deflate-attention", k=k, strength=strength) as (_, calls):
        for call in calls():
            rows = real_rows(case, call)
            if call.part != "self" or bool(call.visible.triu(1).any()) is False:
                expected = call.A @ call.v  # cross-attention, and causal attention, are left alone
            else:
                A = call.A * rows[..., None]
                U, s, Vh = torch.linalg.svd(A)
                gone = (U[..., :k] * s[..., None, :k]) @ Vh[..., :k, :]
                expected = (A - strength * gone) @ call.v
            torch.testing.assert_close(call.output[rows], expected[rows], rtol=0, atol=1e-10)


def clustered(generator, *, tokens, clusters):
    """Logits of tokens that look within their cluster: as many eigenvalues near 1."""
    which = torch.arange(tokens) % clusters
    noise = torch.randn(2, tokens, tokens, generator=generator, dtype=torch.float64)
    return 0.7 * noise + 6.0 * (which[:, None] == which[None]).double()


def test_the_iteration_finds_what_factorising_finds_where_directions_stand_out():
    generator = torch.Generator().manual_seed(0)
    A = clustered(generator, tokens=300, clusters=4).softmax(-1)
    start = torch.randn(2, 300, 16, generator=generator, dtype=torch.float64)
    exact = leading_left_vectors(A, 4, 0, start)
    found = leading_left_vectors(A, 4, 4, start)
    torch.testing.assert_close(found @ found.mT, exact @ exact.mT, rtol=0, atol=1e-6)


def test_centring_removes_one_of_several_outliers_and_deflating_all():
    model = AttentionOnly(tokens=120, width=240, heads=2, layers=1, drawn=1.0, seed=0)
    model.blocks[0].logits.copy_(clustered(torch.Generator().manual_seed(1), tokens=120, clusters=3))
    with torch.no_grad():
        model.blocks[0].output.weight.copy_(torch.eye(240))

    def rank():
        return float(metrics.gram_stable_rank(model.states()[0][:, :120]))  # of the first head

    found = [rank()]
    for remedy in ("center-attention", "deflate-attention?k=1", "deflate-attention?k=3"):
        with fullrank.repair(model, remedy, batch={"X": model.start}):
            found.append(rank())
    plain, centred, one, three = found
    assert max(plain, centred, one) < 4
    assert three > 2 * max(plain, centred, one)


def test_values_have_gradients_and_the_vectors_count_as_constants():
    model = AttentionOnly(tokens=16, width=32, heads=4, layers=1, seed=0)
    with fullrank.repair(model, "deflate-attention", batch={"X": model.start}):
        model(model.start).square().sum().backward()
    for parameter in model.parameters():
        assert torch.isfinite(parameter.grad).all()
        assert parameter.grad.abs().max() > 0


def test_no_more_can_be_removed_than_there_is():
    model = AttentionOnly(tokens=16, width=32, heads=4, layers=1, seed=0)
    with pytest.raises(RemedyError, match="k=16 would leave nothing of maps of 16 tokens"):
        fullrank.repair(model, "deflate-attention?k=16", batch={"X": model.start})
