"""The page on verdicts: its tables are written from the catalogue and the thresholds.

Run `python tests/diagnosis/verdicts_page.py` to write `docs/verdicts.md` anew.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # run as a script, this file finds its neighbours, but not those of their folder
    sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from transformers import GPT2Config, GPT2Model

import fullrank
from fullrank.diagnosis import THRESHOLDS
from fullrank.diagnosis.catalogue import FAILURES
from fullrank.spec import Subject
from healthy.table import Line, number, read

__all__ = ["PAGE", "measured", "page"]

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "docs" / "verdicts.md"
HEALTHY = ROOT / "benchmarks" / "specificity.md"

HEAD = """# Verdicts

A verdict is a claim about a model with what it rests on: numbers, what they are compared with, what an intervention
changed, what would show it to be wrong, and the command to run next. `fullrank examine SPEC` ends with those it has,
and with what was looked for and is not there, and what could not be looked for and why. No verdict is also an answer:
read what was checked.

```python
import fullrank

report = fullrank.examine(model, batch, verify=True)
for verdict in report.verdicts:
    print(verdict.severity, verdict.name, verdict.claim)
    for effect in verdict.effects:
        print(effect.intervention, effect.change, effect.low, effect.high, effect.unit)
print(report.diagnosis.weights, report.diagnosis.reference, report.diagnosis.outcome)
print(report.diagnosis.clear, report.diagnosis.unchecked)
report.ratios.query("metric == 'token_energy'")    # every number beside its initialisation and its null
```

On the command line: `--verify` tests, `--fail-on warn` (or `fail`) gives exit code 1 where a verdict is that grave,
and `fullrank explain dead-depth` says what one of them means, when it is harmless, how it is tested and where it
comes from.

A warning or a failure also names remedies to try, and the command that tries them (`verdict.candidates`,
`verdict.screen`). They are a short list for each failure from what papers say; which of them helps a model is what
[screening](repairing.md) finds out.

## What a number is compared with

- **The same architecture at its own random initialisation, on the same batch.** It is drawn by itself: built anew
  from the configuration, or a copy that is reset module by module. The report says how it was made, or why there is
  none. It costs a second copy of the weights while that lasts; `--no-reference` leaves it out. Singular values
  are not measured of it. With `--contexts` it is read at the same contexts.
- **The null**: Gaussian tokens of the same shape for the stream; of an attention map the same rows with their entries
  permuted.
- **The dtype**: its rounding and its range. Numbers at the floor are rounding, and no other verdict rests on them.

Every number stands beside the first two in `report.ratios`, and the terminal has columns `× init`. A similarity of
0.95 means one thing where the initialisation has 0.2 and another where it has 0.94.

## Trained or fresh

The same number is a fault in one and nothing in the other: at default initialisation every head of a GPT-2 averages,
and it trains. The report says whether weights look trained or fresh and how that is known: they were read from a
checkpoint, drawn when the model was built, or, of a module that was passed as it is, compared with a fresh draw
tensor by tensor. Every failure declares for which weights it means something, and is not looked for in others. Fresh
weights are their own initialisation: they are held against the null, the dtype and gradients.

## How grave

| severity | what it takes |
|---|---|
| note | the numbers alone: a suspicion that no intervention has tested, or a fact that is worth knowing |
| warn, fail | a reference is exceeded and, where one can test it, an intervention's 95 % interval bears it out |

A suspicion that an intervention refutes is withdrawn, and the failure is listed as clear. Of several blocks, or layers
of heads, each is tested by itself, and only those that are refuted are left out, which the verdict says. One whose
interval holds the limit stays a note. Where no intervention can be run on a model the reason is listed, and the
references decide: what did not exceed one is a note. fail and warn differ by how much of the model is concerned.
Without `--verify` a suspicion that can be tested is a note, whatever its numbers.

## How it is tested

An intervention changes one thing in the forward: a block is skipped, a head's output replaced by zero or by its mean,
heads that write alike merged into one, a sink hidden, the stream replaced by its sequence means. What that changes is
measured document by document, against the same document unchanged: in nats of the model's own loss where the batch
makes it return one; else as the divergence of its output distribution; else as the share of the final state's variance
that is lost. The interval is of Student's t over documents. Fewer than two documents give no interval, so pass several.
The model is left as it was, bit for bit.

One more intervention is done by hand (`fullrank.diagnosis.interventions.apply`): attention without its leading singular
direction. No verdict is tested by it: of attention that averages it takes out what silencing the head takes out, at
many times the cost.

## Failures

{failures} failures are looked for. *Needs* is what examine must be asked for beyond its defaults.

{table_of_failures}

`heads` in the layer table counts kinds of heads, which `normalized_entropy`, `selectivity` and `sink_mass` tell
apart: a pointer reads a few keys, other ones for other queries; a mixer many, in its own way for every query; an
average much the same for every query; a sink rests on one key.

Two failures hold the numbers against more where they are told: `--target-dtype float16` (or `float8_e4m3`, …;
`target_dtypes=`) asks whether the numbers fit a dtype that the model is not run in, and `--epsilon 1e-8` (`epsilon=`)
whether gradients of queries and keys stand above the optimiser's.

## Limits

Every number that a verdict compares with is one of these; there are no others. How often each failure is named where
it was planted is in [planted.md](../benchmarks/planted.md). What is said of models with nothing wrong (every family of
[the compatibility table](compatibility.md) at its default initialisation, the pretrained encoder, small trained models)
is in [specificity.md](../benchmarks/specificity.md), from which two columns are taken. *False alarms*: warnings and
failures among the healthy models in which the limit was read; 0 of n would bound the rate by 3/n with 95 % confidence,
had the models been drawn independently of each other. *Twice as sensitive*: of how many the failures that read it would
say more with this limit alone moved by a factor of two, to the side with the graver alarms.

{table_of_thresholds}

This page is written by `python tests/diagnosis/verdicts_page.py`.
"""


def page() -> str:
    """The whole page."""
    return HEAD.format(
        failures=len(FAILURES),
        table_of_failures=_failures(),
        table_of_thresholds=_thresholds(),
    )


def _failures() -> str:
    needs = _needs()
    rows = [
        (
            f"`{one.name}`",
            one.title,
            "" if one.valid_for == "any" else one.valid_for,
            needs.get(one.name, ""),
            "yes" if "--verify" in one.command else "",
        )
        for one in FAILURES
    ]
    return _table(("name", "what it is", "for weights", "needs", "tested by intervention"), rows)


def _needs() -> dict[str, str]:
    """What could not be checked of a small model that is told to be trained, examined with the defaults."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        ends = {"bos_token_id": 49, "eos_token_id": 49}
        model = GPT2Model(GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=50, n_positions=64, **ends)).eval()
    ids = torch.randint(50, (3, 24), generator=torch.Generator().manual_seed(1))
    report = fullrank.examine(Subject(model, "small", "", False), {"input_ids": ids}, spectrum=False)
    assert report.diagnosis is not None
    words = {one.name: one.words.partition(";")[0].removeprefix("needs ") for one in report.diagnosis.unchecked}
    return {name: f"{said.rstrip('.')}." for name, said in words.items()}


def _thresholds() -> str:
    lines = measured()
    rows = [
        (f"`{name}`", number(one.value), one.unit, *_alarms(lines.get(name), one.value), one.reason)
        for name, one in THRESHOLDS.items()
    ]
    return _table(("limit", "value", "unit", "false alarms", "twice as sensitive", "reason"), rows)


def measured() -> dict[str, Line]:
    """What is known of each limit from healthy models."""
    return read(HEALTHY.read_text(encoding="utf-8")) if HEALTHY.exists() else {}


def _alarms(line: Line | None, value: float) -> tuple[str, str]:
    if line is None or line.value != number(value):
        return "not measured", ""
    if not line.held:
        return "never read", ""
    graver = line.then.warn + line.then.fail
    more = [f"{graver} warned of"] if graver else []
    if line.then.note > line.now.note:
        more.append(f"{line.then.note} noted, not {line.now.note}")
    return f"{line.now.warn + line.now.fail} of {line.held}", f"at {line.moved}: {', '.join(more)}" if more else "none"


def _table(heads: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [heads, ("---",) * len(heads), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "/") for cell in line) + " |" for line in lines)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)
