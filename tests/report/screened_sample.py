"""A screening like one of a deep post-norm decoder: remedies that help, one that is idle, one that does not fit."""

import math
from dataclasses import replace

from fullrank.report import LossChange, Restored, Screened, Screening
from report.synthetic import report

NAMES = ("residual-scale", "center-attention", "rezero", "layer-scale", "temperature")


def profile(name, *, keep=1.0, reference=None):
    made = report(model=name, layers=12, heads=2, tokens=16, causal=True, seed=3, spectra=False)
    rows = made.rows.map(
        lambda row: replace(row, value=keep * row.value) if row.metric == "similarity" and row.value else row
    )
    return replace(made, rows=rows, reference=reference)


def restored(after, *, before=0.98, reference=0.31):
    return (
        Restored("similarity", "decoder, layer 12", before, after, reference, 0.0, healthy="low", tolerance=0.04),
        Restored(
            "residual", "decoder, layer 12", math.sqrt(1 - before), math.sqrt(1 - after), 0.83, 1.0, healthy="high"
        ),
    )


def screening(*, steps=150):
    rows = [
        Screened("as it is", "as it is", restored=restored(0.98), identity_distance=0.71),
        Screened("center-attention", "remedy", "changes-function", "gain 1", restored(0.35), 0.66),
        Screened("residual-scale", "remedy", "init-only", "α = 1, /√L", restored(0.28), 0.21, extra_parameters=0),
        Screened("rezero", "remedy", "init-only", "", restored(0.06), 0.0, extra_parameters=24),
        Screened("layer-scale", "remedy", "init-only", "ε = 1e-4", restored(0.07), 0.0003, extra_parameters=6_144),
        Screened("temperature", "remedy", "changes-function", "log-context", restored(0.97), 0.7),
        Screened("warm-up", "recommendation", "", "a tenth of the steps", restored(0.98), 0.71),
        Screened("registers", note="it adds image tokens, and this model reads words.", failed=True),
    ]
    if steps:
        losses = {
            "as it is": (2.76, None),
            "center-attention": (1.81, (-0.95, -1.02, -0.88)),
            "residual-scale": (1.69, (-1.07, -1.14, -1.0)),
            "rezero": (1.74, (-1.02, -1.1, -0.94)),
            "layer-scale": (2.1, (-0.66, -0.74, -0.58)),
            "temperature": (2.77, (0.01, -0.02, 0.04)),
            "warm-up": (math.inf, None),
        }
        rows = [trained(row, *losses[row.variant]) if row.variant in losses else row for row in rows]
    about = {
        "model": "arch:gpt2?num_hidden_layers=12",
        "architecture": "GPT2LMHeadModel, 12 layers, width 64, 666k parameters",
        "task": "text: the next symbol",
        "chance": math.log(16),
        "seeds": [0, 1, 2],
        "seconds": 412.3,
    }
    profiles = {name: profile(name, keep=0.2 + index / 4.2) for index, name in enumerate(NAMES)}
    profiles["as it is"] = profile("as it is", keep=1.4, reference=profile("reference"))
    notes = ("Three seeds of the order of batches; the weights are the same for all.",)
    return Screening.of(rows, steps=steps, about=about, profiles=profiles, notes=notes)


def trained(row, loss, change):
    own = {"loss": loss, "trained": loss < 2.6, "learning_rate": 1e-3, "widest_rate": 3e-3, "seconds_ratio": 1.0}
    made = None if change is None else LossChange(*change, seeds=3, sequences=64)
    return replace(row, **own, change=made)
