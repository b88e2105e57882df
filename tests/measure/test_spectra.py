"""The observer of spectra against dense singular values of the rows and keys in scope."""

import math

import pytest
import torch

from fullrank import metrics
from fullrank.capture.events import AttentionCall
from fullrank.measure import SpectrumObserver
from fullrank.operators import AttentionOperator, Causal, Full, Padding

T = 40


def call(attention, *, causal=False, real=None):
    return AttentionCall("decoder", 1, "self", "blocks.0", attention, None, real, real, causal, "sdpa", torch.float32)


@pytest.fixture
def qk(generator):
    return [torch.randn(6, 2, T, 8, generator=generator) * 2 for _ in range(2)]


def number(rows, metric, head):
    (row,) = [r for r in rows if (r.metric, r.head) == (metric, head)]
    return row


@pytest.mark.parametrize("causal", [False, True])
def test_spectra_are_of_the_rows_in_scope_and_the_real_keys(qk, causal):
    q, k = qk
    real = torch.ones(6, T, dtype=torch.bool)
    real[1, 30:] = False
    mask = (Causal() if causal else Full()) & Padding(real)
    observer = SpectrumObserver()
    observer.see(call(AttentionOperator(q, k, mask=mask), causal=causal, real=real))
    rows = observer.rows()
    assert {row.scope for row in rows} == {"late" if causal else "all"}
    for head in range(2):
        found = {name: [] for name in ("attention_s1", "attention_s2", "uniform_distance", "smoothing_gain", "share")}
        for b in range(4):
            n = int(real[b].sum())
            S = q[b, head, :n].double() @ k[b, head, :n].double().T / math.sqrt(8)
            visible = torch.ones(n, n, dtype=torch.bool).tril() if causal else torch.ones(n, n, dtype=torch.bool)
            A = torch.softmax(S.masked_fill(~visible, -torch.inf), -1)
            U = visible / visible.sum(1, keepdim=True)
            keep = torch.arange(1, n + 1) * 2 > n if causal else torch.ones(n, dtype=torch.bool)
            A, U = A[keep], U[keep]
            s = torch.linalg.svdvals(A)
            found["attention_s1"].append(s[0])
            found["attention_s2"].append(s[1])
            found["uniform_distance"].append(torch.linalg.svdvals(A - U)[0])
            found["smoothing_gain"].append(torch.linalg.svdvals(A - A.mean(0))[0])
            found["share"].append(s[0] ** 2 / A.square().sum())
        for name, values in found.items():
            row = number(rows, name if name != "share" else "outlier_share", head)
            assert row.value == pytest.approx(float(torch.stack(values).mean()), rel=1e-3), name
            assert row.n == 4  # of six sequences, four are taken


def test_all_singular_values_of_short_maps_are_kept_for_drawing(qk):
    q, k = qk
    observer = SpectrumObserver()
    observer.see(call(AttentionOperator(q, k)))
    spectra = observer.spectra()
    assert [one.head for one in spectra] == [0, 1]
    A = torch.softmax(q[0, 1].double() @ k[0, 1].double().T / math.sqrt(8), -1)
    assert spectra[1].complete
    assert spectra[1].values == pytest.approx(torch.linalg.svdvals(A).tolist(), rel=1e-3, abs=1e-5)
    assert len(spectra[1].null) == T
    Y2 = float(metrics.inverse_participation(A))
    assert spectra[1].inverse_participation == pytest.approx(Y2, rel=1e-4)
    # the permuted map has the same energy: its rows hold the same entries
    assert sum(s * s for s in spectra[1].null) == pytest.approx(float(A.square().sum()), rel=1e-3)


def test_long_maps_keep_their_leading_values(generator):
    q, k = (torch.randn(1, 1, 600, 8, generator=generator) for _ in range(2))
    observer = SpectrumObserver()
    observer.see(call(AttentionOperator(q, k)))
    (one,) = observer.spectra()
    A = torch.softmax(q[0, 0].double() @ k[0, 0].double().T / math.sqrt(8), -1)
    assert not one.complete
    assert one.tokens == 600
    assert one.values == pytest.approx(torch.linalg.svdvals(A)[: len(one.values)].tolist(), rel=2e-2)


def test_the_bulk_is_at_its_null_for_independent_rows(generator):
    q = torch.randn(2, 2, 256, 256, generator=generator)
    k = torch.randn(2, 2, 256, 256, generator=generator)
    observer = SpectrumObserver()
    observer.see(call(AttentionOperator(q, k, scale=0.3 / 16)))
    assert number(observer.rows(), "bulk_excess", 0).value == pytest.approx(1, abs=0.35)


def test_maps_beyond_the_budget_say_so_where_no_closed_form_holds(generator):
    q, k = (4 * torch.randn(1, 1, 200, 8, generator=generator) for _ in range(2))
    observer = SpectrumObserver(memory=1 << 14)
    observer.see(call(AttentionOperator(q, k)))
    row = number(observer.rows(), "bulk_excess", 0)
    assert row.value is None
    assert "could not be permuted" in row.note


@pytest.mark.parametrize("tokens", [40, 300, 600])
def test_causal_maps_are_read_against_their_permuted_rows_not_the_quarter_circle(generator, tokens):
    q, k = (torch.randn(1, 1, tokens, 32, generator=generator) for _ in range(2))
    observer = SpectrumObserver()
    observer.see(call(AttentionOperator(q, k, mask=Causal()), causal=True))
    (one,) = observer.spectra()
    assert math.isnan(one.inverse_participation)
    assert one.tokens == tokens // 2
    assert len(one.null) == len(one.values)
    assert one.null[0] == pytest.approx(one.values[0], rel=0.1)  # shuffling keeps the outlier
