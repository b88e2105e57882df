"""A synthetic report with a reference and a diagnosis of every severity."""

from dataclasses import replace

from fullrank.report import Report
from fullrank.report.verdict import Checked, Comparison, Diagnosis, Effect, Severity, Verdict
from fullrank.table import Row, Table
from report.synthetic import report

EFFECT = Effect("layer 4 skipped", "loss", 0.0012, -0.0004, 0.0028, 8, 3.21)


def verdict(name="dead-depth", severity=Severity.WARN, *, stack="encoder", **changed):
    """One that has everything a verdict can have."""
    given = {
        "claim": f"Block 4 of {stack} changes the stream by 1.2 % (limit 5 %).",
        "layers": (4,),
        "heads": ((4, 0), (4, 3)),
        "valid_for": "trained",
        "comparisons": (
            Comparison("update_share", f"{stack} layer 4", 0.012, 0.001, "initialisation", 0.31),
            Comparison("rms", f"{stack} layer 4", 2.5, None, "threshold"),
        ),
        "effects": (EFFECT,),
        "refuted_by": "Skipping the block raises the loss.",
        "command": f"fullrank explain {name}",
    }
    return Verdict(name, severity, stack=stack, **(given | changed))


def diagnosis(**changed):
    """Three verdicts, two failures that are clear, one that was not checked."""
    given = {
        "verdicts": (
            verdict("rank-collapse-depth", Severity.FAIL),
            verdict(),
            verdict("sinks", Severity.NOTE, effects=(), comparisons=(), command="fullrank examine ./here --verify"),
        ),
        "clear": (
            Checked("numerics", "encoder: all pairs of tokens differ in float32."),
            Checked("at-the-floor", "encoder: tokens differ by 0.9 of the stream's size − or more."),
        ),
        "unchecked": (Checked("redundant-heads", "needs what heads write through W_O (weights=True, --weights)."),),
        "weights": "trained",
        "because": "they were read from a checkpoint.",
        "reference": "BertModel built anew from its configuration, seed 7919.",
        "outcome": "the change of the loss, of 8 documents",
    }
    return Diagnosis(**(given | changed))


def initial(made, factor=2.0):
    """The same rows at initialisation, every value divided by `factor`."""
    rows = (replace(row, source="initialisation", value=row.value / factor) for row in made.rows if row.value)
    return Report(rows=Table(rows), about={"model": "at initialisation"})


def diagnosed(*, layers=6, heads=4, stack="encoder", **changed):
    """A report with reference and diagnosis: the first head of each layer is a pointer, the others mix."""
    made = report(layers=layers, heads=heads, tokens=16, stack=stack, floor=4)
    gradients = [
        Row(stack, layer, "gradient", "out", "gradient_rms", 0.1 * (1 + layer), stderr=0.01, n=8)
        for layer in range(layers + 1)
    ]
    made = replace(made, rows=Table([*made.rows, *gradients]))
    kinds = tuple(
        (stack, layer, head, "mixer" if head else "pointer") for layer in range(1, layers + 1) for head in range(heads)
    )
    return replace(made, reference=initial(made), diagnosis=diagnosis(kinds=kinds, **changed))
