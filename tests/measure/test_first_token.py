"""A first token that outweighs all others is left out in a scope of its own, and said where it matters."""

import pytest
import torch

from fullrank.capture.events import StreamState
from fullrank.measure import StreamObserver
from fullrank.report.remarks import remarks


def seen(X, real=None, *, causal=()):
    observer = StreamObserver(causal=causal)
    for layer in range(2):
        observer.see(StreamState("encoder", layer, "stream", "out", "", X, real))
    return observer.rows()


def value(rows, metric, scope, layer=1):
    (row,) = [row for row in rows if (row.metric, row.scope, row.layer) == (metric, scope, layer)]
    return row.value


def with_sink(generator, *, tokens=24, factor=100.0):
    X = torch.randn(3, tokens, 16, generator=generator)
    X[:, 0] *= factor
    return X


def test_one_large_first_token_sets_the_stable_rank_and_leaving_it_out_restores_it(generator):
    X = with_sink(generator)
    rows = seen(X)
    assert value(rows, "stable_rank", "all") < 1.1
    sigma = torch.linalg.svdvals(X[:, 1:].double())
    expected = (sigma.square().sum(-1) / sigma[:, 0].square()).mean()
    assert value(rows, "stable_rank", "no-first") == pytest.approx(float(expected), rel=1e-5)
    assert value(rows, "stable_rank", "no-first") > 4


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_first_real_token_is_meant_however_the_batch_is_padded(generator, side):
    X = with_sink(generator, tokens=20)
    pad = torch.randn(3, 6, 16, generator=generator)
    padded = torch.cat([pad, X] if side == "left" else [X, pad], 1)
    real = torch.zeros(3, 26, dtype=torch.bool)
    real[:, 6:] = True
    real = real if side == "left" else real.flip(1)
    plain, other = seen(X), seen(padded, real)
    for metric in ("similarity", "residual", "stable_rank", "centered_stable_rank", "token_energy"):
        assert value(other, metric, "no-first") == pytest.approx(value(plain, metric, "no-first"), rel=1e-5), metric


def test_causal_stacks_have_no_such_scope_since_late_tokens_leave_the_first_out(generator):
    scopes = {row.scope for row in seen(with_sink(generator), causal=["encoder"])}
    assert scopes == {"all", "late", "samples"}


def test_the_report_says_where_a_first_token_sets_the_numbers_and_is_silent_elsewhere(generator):
    (sentence,) = remarks(seen(with_sink(generator)))
    assert "stable_rank is 1.0" in sentence
    assert "no-first" in sentence
    assert remarks(seen(torch.randn(3, 24, 16, generator=generator))) == []
