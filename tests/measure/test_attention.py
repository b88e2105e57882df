"""The observer of attention calls against dense maps, written out row by row."""

import math

import pytest
import torch

from fullrank.capture.events import AttentionCall
from fullrank.measure.attention import SINK_SHARE, AttentionObserver
from fullrank.measure.summaries import row_scopes
from fullrank.operators import AttentionOperator, Causal, Full, Padding

T = 24


def call(attention, V=None, *, causal=False, real=None, layer=1):
    return AttentionCall(
        stack="decoder" if causal else "encoder",
        layer=layer,
        part="self",
        path="blocks.0.attention",
        attention=attention,
        value=V,
        real_queries=real,
        real_keys=real,
        causal=causal,
        kernel="scaled_dot_product_attention",
        dtype=torch.float32,
    )


@pytest.fixture
def qkv(generator):
    return tuple(torch.randn(2, 3, T, 8, generator=generator) * 1.5 for _ in range(3))


def number(rows, metric, head=0, scope="all"):
    (row,) = [r for r in rows if (r.metric, r.head, r.scope) == (metric, head, scope)]
    return row.value


def dense_rows(q, k, causal, keep):
    """The eligible rows of one head in float64: (row index, visible keys, probabilities, scores)."""
    S = (q.double() @ k.double().T) / math.sqrt(q.shape[-1])
    n = int(keep.sum())
    for t in range(T):
        seen = [s for s in range(T) if keep[s] and (not causal or s <= t)]
        if keep[t] and len(seen) >= min(32, math.ceil(n / 4)):
            yield t, seen, torch.softmax(S[t, seen], 0), S[t, seen]


@pytest.mark.parametrize(("causal", "scope"), [(False, "all"), (True, "all"), (True, "late")])
def test_row_numbers_are_means_over_the_rows_of_the_scope(qkv, causal, scope):
    q, k, V = qkv
    real = torch.ones(2, T, dtype=torch.bool)
    real[1, 18:] = False
    mask = (Causal() if causal else Full()) & Padding(real)
    observer = AttentionObserver()
    observer.see(call(AttentionOperator(q, k, mask=mask), V, causal=causal, real=real))
    rows = observer.rows()
    for head in range(3):
        per_sequence = {name: [] for name in ("entropy", "normalized_entropy", "inverse_participation", "selectivity")}
        per_sequence |= {name: [] for name in ("effective_keys", "logit_std", "log_context_gauge", "max_logit")}
        per_sequence |= {"sink_mass": [], "branch_energy": [], "contrast_gain": []}
        for b in range(2):
            last = int(real[b].sum())
            found = list(dense_rows(q[b, head], k[b, head], causal, real[b]))
            found = [row for row in found if scope == "all" or 2 * (row[0] + 1) > last]
            average = torch.zeros(T, dtype=torch.float64)
            for _, seen, p, _ in found:
                average[seen] += p / len(found)
            H = [-(p * p.log()).sum() for _, _, p, _ in found]
            per_sequence["entropy"].append(torch.stack(H).mean())
            per_sequence["normalized_entropy"].append(
                torch.stack([h / math.log(len(s)) for h, (_, s, *_) in zip(H, found, strict=True)]).mean()
            )
            per_sequence["effective_keys"].append(torch.stack(H).exp().mean())
            per_sequence["inverse_participation"].append(torch.stack([p.square().sum() for _, _, p, _ in found]).mean())
            kl = [(p * (p / (average[s] / average[s].sum())).log()).sum() for _, s, p, _ in found]
            per_sequence["selectivity"].append(torch.stack(kl).mean())
            std = [scores.std(correction=0) for *_, scores in found]
            per_sequence["logit_std"].append(torch.stack(std).mean())
            per_sequence["log_context_gauge"].append(
                torch.stack([x / math.sqrt(math.log(len(s))) for x, (_, s, *_) in zip(std, found, strict=True)]).mean()
            )
            per_sequence["max_logit"].append(torch.stack([scores.max() for *_, scores in found]).max())
            per_sequence["sink_mass"].append(average.max())
            v = V[b, head].double()
            AV = torch.stack([p @ v[s] for _, s, p, _ in found])
            UV = torch.stack([v[s].mean(0) for _, s, *_ in found])
            per_sequence["branch_energy"].append((AV - UV).square().sum() / AV.square().sum())
            out, into = (X.var(0, correction=0).sum() for X in (AV, v[real[b]]))
            per_sequence["contrast_gain"].append((out / into).sqrt())
        for name, values in per_sequence.items():
            expected = float(torch.stack(values).mean())
            assert number(rows, name, head, scope) == pytest.approx(expected, rel=1e-4, abs=1e-6), name


def test_a_sink_is_left_out_and_the_rows_renormalised(generator):
    q = torch.randn(1, 1, T, 8, generator=generator)
    k = torch.randn(1, 1, T, 8, generator=generator)
    q[..., 0], k[..., 0] = 4.0, 0.0
    k[0, 0, 0, 0] = 8.0  # every query looks at the first key
    observer = AttentionObserver()
    observer.see(call(AttentionOperator(q, k), causal=False))
    rows = observer.rows()
    assert number(rows, "sink_mass") > SINK_SHARE
    assert number(rows, "sink_position") == 0
    A = torch.softmax(q[0, 0].double() @ k[0, 0].double().T / math.sqrt(8), -1)[:, 1:]
    A = A / A.sum(-1, keepdim=True)
    assert number(rows, "entropy", scope="no-sink") == pytest.approx(float(-(A * A.log()).sum(-1).mean()), rel=1e-4)
    assert number(rows, "entropy") < number(rows, "entropy", scope="no-sink")


def test_without_a_sink_the_no_sink_numbers_are_the_plain_ones(qkv):
    q, k, V = qkv
    observer = AttentionObserver()
    observer.see(call(AttentionOperator(0.1 * q, k), V))
    rows = observer.rows()
    for metric in ("entropy", "selectivity", "effective_keys"):
        assert number(rows, metric, 1, "no-sink") == number(rows, metric, 1)


def test_causal_calls_are_headlined_by_late_queries(qkv):
    q, k, _ = qkv
    scopes = row_scopes(call(AttentionOperator(q, k, mask=Causal()), causal=True))
    assert list(scopes) == ["all", "late"]
    assert scopes["late"][0].nonzero().flatten().tolist() == list(range(12, 24))
    assert list(row_scopes(call(AttentionOperator(q, k)))) == ["all"]


def test_unseen_values_give_a_reason_instead_of_a_number(qkv):
    q, k, _ = qkv
    observer = AttentionObserver()
    observer.see(call(AttentionOperator(q, k)))
    for metric in ("branch_energy", "contrast_gain"):
        (row,) = [r for r in observer.rows() if r.metric == metric and r.head == 0]
        assert row.value is None
        assert "values" in row.note


def test_positions_count_real_tokens_however_the_batch_is_padded(generator):
    q = torch.randn(1, 1, T, 8, generator=generator)
    k = torch.randn(1, 1, T, 8, generator=generator)
    q[..., 0], k[..., 0] = 4.0, 0.0
    k[0, 0, 5, 0] = 8.0  # the first real key after five padded ones
    real = torch.ones(1, T, dtype=torch.bool)
    real[:, :5] = False
    observer = AttentionObserver()
    observer.see(call(AttentionOperator(q, k, mask=Full() & Padding(real)), real=real))
    assert number(observer.rows(), "sink_position") == 0
