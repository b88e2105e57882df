"""A report like one of a real encoder: 12 layers of 12 heads, eight sequences, every kind of row."""

import math
import random
from dataclasses import replace

from fullrank.report import HeadSpectrum, Report
from fullrank.report.spectrum import quarter_circle
from fullrank.table import Row, Slope, Table

STREAM = {
    "rms": lambda d: 0.6 + 1.9 * d,
    "similarity": lambda d: 0.12 + 0.55 * d**1.5,
    "residual": lambda d: 0.93 - 0.35 * d,
    "shared_energy": lambda d: 0.1 + 0.3 * d,
    "sequence_energy": lambda d: 0.05 + 0.15 * d,
    "token_energy": lambda d: 0.85 - 0.45 * d,
    "stable_rank": lambda d: 14 - 11 * d,
    "centered_stable_rank": lambda d: 21 - 8 * d,
    "effective_rank": lambda d: 92 - 22 * d,
    "centered_effective_rank": lambda d: 97 - 18 * d,
    "update_share": lambda d: 0.9 - 0.5 * math.sqrt(d),
    "channel_entropy": lambda d: 0.96 - 0.2 * d,
    "max_to_median": lambda d: 8 * math.exp(4.2 * d),
}
HEADS = {
    "entropy": lambda s: 4.4 * s,
    "normalized_entropy": lambda s: 0.98 * s,
    "selectivity": lambda s: 1.8 * (1 - s),
    "sink_mass": lambda s: 0.02 + 0.8 * (1 - s) ** 2,
    "outlier_share": lambda s: 0.15 + 0.8 * s**2,
    "attention_s2": lambda s: 0.95 - 0.75 * s,
}
REASON = "as many tokens as features: the row space of the first state is everything"
FLOOR = "at the float floor of float32: differences between tokens are rounding"


def report(
    *,
    model="a-small-encoder",
    layers=12,
    heads=12,
    tokens=128,
    causal=False,
    source="measured",
    seed=0,
    stack=None,
    spectra=True,
    notes=("Attention kernel: scaled_dot_product_attention, as the model called it.",),
    floor=None,
):
    """Synthetic numbers with plausible shapes; the same arguments give the same report."""
    draw = random.Random(seed)
    stack = stack or ("decoder" if causal else "encoder")
    rows = []
    scopes = ("all", "late") if causal else ("all",)
    for layer in range(layers + 1):
        depth = layer / layers
        for metric, curve in STREAM.items():
            if metric == "update_share" and layer == 0:
                continue
            for site, part in (("stream", "out"), ("stream", "mid"), ("read", "out"), ("read", "mid")):
                if (part == "mid" and layer == 0) or (part != "out" and "rank" in metric):
                    continue
                if metric == "update_share" and (site, part) != ("stream", "out"):
                    continue
                for scope in scopes:
                    value = curve(depth) * (1 + 0.02 * draw.gauss(0, 1)) * (0.8 if site == "read" else 1)
                    note = FLOOR if metric == "residual" and layer == floor and site == "stream" else ""
                    rows.append(
                        Row(stack, layer, site, part, metric, value, scope=scope, stderr=abs(value) * 0.03, n=8,
                            source=source, note=note)
                    )  # fmt: skip
        if layer:
            value = None if layer < 3 else 0.2 + 0.5 * depth
            rows.append(
                Row(
                    stack,
                    layer,
                    "stream",
                    "out",
                    "span_novelty",
                    value,
                    n=8,
                    source=source,
                    note="" if value else REASON,
                )
            )
    sharp = {(layer, head): draw.betavariate(4, 1.6) for layer in range(1, layers + 1) for head in range(heads)}
    for (layer, head), s in sharp.items():
        for metric, curve in HEADS.items():
            for scope in (*scopes, "late+no-sink" if causal else "no-sink"):
                value = None if metric == "attention_s2" and layer == 5 and head == 3 else curve(s)
                rows.append(
                    Row(stack, layer, "attention", "self", metric, value, head=head, scope=scope, stderr=0.01, n=8,
                        source=source, exact=metric != "attention_s2", note="" if value else "did not converge")
                )  # fmt: skip
    kept = (
        tuple(_spectrum(stack, layer, head, s, tokens, draw) for (layer, head), s in sharp.items()) if spectra else ()
    )
    about = {
        "model": model,
        "architecture": "BertModel",
        "parameters": 22_713_216,
        "fresh": False,
        "stacks": [{"name": stack, "blocks": layers, "heads": heads, "width": 384, "causal": causal, "kernel": "sdpa"}],
        "input": {"kind": "text", "description": "eight documents of the text that ships with fullrank",
                  "sequences": 8, "tokens": 1003, "context": tokens},
        "dtype": "float32",
        "device": "cpu",
        "seed": 0,
        "kernels": "untouched",
        "notes": list(notes),
        "versions": {"python": "3.11.2", "torch": "2.13.0", "fullrank": "0.1.0"},
        "created": "2026-11-22T04:00:00+00:00",
        "seconds": 11.3,
        "nulls": {stack: {"similarity": 0.0, "residual": 0.996, "centered_stable_rank": 47.1}},
    }  # fmt: skip
    return Report(rows=Table(rows), about=about, spectra=kept)


def with_contexts(*, layers=4, heads=3, contexts=(64, 256, 1024), **options):
    """The report of a causal decoder that was read at several contexts too, with slopes."""
    plain = report(layers=layers, heads=heads, causal=True, spectra=False, **options)
    draw = random.Random(7)
    rows, slopes = list(plain.rows), []
    middle = sum(map(math.log2, contexts)) / len(contexts)
    for row in plain.rows:
        stream = row.metric in ("similarity", "residual", "token_energy") and (row.site, row.part) == ("stream", "out")
        if not ((stream or row.metric in ("entropy", "sink_mass")) and row.scope in ("late", "late+no-sink")):
            continue
        change = draw.gauss(-0.03, 0.03) * row.value
        for c in contexts:
            value = row.value + change * (math.log2(c) - middle)
            rows.append(replace(row, value=value, scope=f"{row.scope}+context={c}", stderr=0.02))
        half = None if row.metric == "token_energy" else abs(0.02 * row.value)
        ends = {} if half is None else {"stderr": half / 2.4, "low": change - half, "high": change + half}
        place = (row.stack, row.layer, row.site, row.part, row.metric, row.head, row.scope)
        slopes.append(
            Slope(*place, contexts, 8, per_doubling=change, **ends, note="" if ends else "of the whole batch")
        )
    return replace(plain, rows=Table(rows), context_slopes=tuple(slopes))


def _spectrum(stack, layer, head, s, tokens, draw):
    Y_2 = 1 / tokens + 0.25 * (1 - s) ** 2 + 0.002
    edge = 2 * math.sqrt(Y_2 - 1 / tokens)
    null = sorted(
        [1.0 + 0.3 * (1 - s), *(edge * q * (1 + 0.01 * draw.gauss(0, 1)) for q in quarter_circle(tokens - 1))]
    )
    tail = [0.9 * edge * q for q in quarter_circle(tokens - 1)]
    lifted = [value + (1 - s) * 0.9 * math.exp(-rank / 4) for rank, value in enumerate(tail)]
    values = sorted([1.0 + 0.5 * (1 - s), *lifted])
    return HeadSpectrum(stack, layer, "self", head, tuple(values[::-1]), tokens, True, tuple(null[::-1]), Y_2)
