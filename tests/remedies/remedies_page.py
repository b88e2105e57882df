"""The page on remedies: written from the catalogue.

Run `python tests/remedies/remedies_page.py` to write `docs/remedies.md` anew.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from fullrank.diagnosis.catalogue import FAILURES
from fullrank.remedies import CATALOGUE, Parameter, Remedy
from fullrank.remedies.candidates import CANDIDATES

__all__ = ["PAGE", "page"]

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "docs" / "remedies.md"

GROUPS = {
    "attention": "What attention computes",
    "weights": "Values of weights",
    "residual": "The residual stream",
    "norm": "Norms",
    "stream": "What a block hands on",
    "tokens": "Which tokens there are",
    "loss": "The training loss",
    "state space": "State spaces",
}

HEAD = """# Remedies

{count} remedies can be applied to a model by `fullrank.repair(model, "NAME")`, and taken out again.
[Repairing](repairing.md) says how, and how to find out which of them helps. This page says of each what it is for, what
it computes, what it can be told, what it costs, and when it does not help. `fullrank remedies NAME` prints the same on
a terminal, and in Python it is `fullrank.remedies.CATALOGUE`:

```python
from fullrank.remedies import CATALOGUE

for name, remedy in CATALOGUE.items():
    print(name, remedy.exactness, remedy.acts_on, remedy.addresses, [one.name for one in remedy.parameters])
print(CATALOGUE["temperature"].formula, CATALOGUE["temperature"].limits)
```

A remedy is written with its parameters as in `"temperature?kind=log-context&scale=2"`, or with keywords,
`fullrank.repair(model, "temperature", kind="log-context")`. On a command line put it in quotes: `?` and `&` mean
something to a shell. A parameter that accepts none is written `none` there and `None` in Python.

## Exactness

| exactness | at the default parameters, at the moment of applying |
| --- | --- |
| identity-now | The model computes what it computed before, to rounding. It is another function once it is trained. |
| init-only | For weights that were not trained yet: the function changes, and what was learnt is lost or disturbed. |
| changes-function | The function is another one at once; for which weights that is meant its limits say. |

It is said of the default parameters alone: `temperature` leaves a function as it is, `temperature?scale=2` does not.
What a repair did to the output on your batch is measured and printed, whatever is declared.

## Symbols

{symbols}

## All of them

{table}

## For which failure

What `fullrank screen` tries first where a verdict names the failure, in this order: a choice from what papers say, and
no measurement. [Verdicts](verdicts.md) says what the failures are, and in which numbers they show: `similarity` and
others.

{failures}

{entries}

This page is written by `python tests/remedies/remedies_page.py`.
"""

SYMBOLS = (
    ("A", "an attention map: A_ts is what query t gives to key s, and a row adds to 1"),
    ("U", "the map that is uniform over what each query may see: U_ts = 1/#visible(t)"),
    ("J", "U where every query sees all keys: every entry 1/T"),
    ("Q, K, V", "queries, keys and values of a head; q, k, v are a row of each"),
    ("W_Q, W_K, W_V, W_O", "the projections to queries, keys and values, and the output projection of attention"),
    (
        "s",
        "scores q·k/√d_k before the softmax; with an index, s₁ ≥ s₂ ≥ …, singular values of A, with vectors u and v",
    ),
    ("O", "a head's output: AV, or what a remedy makes of it"),
    ("X", "the states of the residual stream, one row per token; x is a row"),
    ("F(X)", "what a branch (attention or MLP) adds to the stream"),
    ("N(X)", "a norm: LayerNorm, RMSNorm or what the model has"),
    ("T", "tokens in a sequence; n is the number of keys that one query sees"),
    ("L", "blocks, l or ℓ the number of one; where a formula says so, log n"),
    ("d, d_k", "width of the stream, and of a head's queries and keys"),
    ("ρ", "mean cosine between different tokens of a sequence"),
    ("σ, μ", "the logistic function or a standard deviation, as the formula says; a mean"),
    ("ω, α, β, γ, λ, τ, g", "numbers or vectors of the remedy, trained where its parameters say so"),
    ("h", "as an index: one for each head"),
    ("⊙, ‖·‖, ‖·‖_F", "the product entry by entry; a length; the root of the sum of squares of a matrix"),
    ("⌊·⌋, ⌈·⌉, ⟨·⟩", "rounded down, rounded up, a mean"),
    ("A ← …", "what stands to the right takes the place of what stands to the left"),
)


def page() -> str:
    """The whole page."""
    groups = {acts: [one for one in CATALOGUE.values() if one.acts_on == acts] for acts in GROUPS}
    return HEAD.format(
        count=sum(map(len, groups.values())),
        symbols=_table(("symbol", "what it is"), SYMBOLS),
        table=_table(
            ("acts on", "remedy", "exactness", "what it does"),
            [(acts, _link(one.name), one.exactness, one.title) for acts, ones in groups.items() for one in ones],
        ),
        failures=_table(
            ("failure", "what it is", "candidates"),
            [
                (f"`{one.name}`", one.title, ", ".join(map(_candidate, CANDIDATES.get(one.name, ()))))
                for one in FAILURES
            ],
        ),
        entries="\n\n".join(
            "\n\n".join([f"## {GROUPS[acts]}", *map(_entry, ones)]) for acts, ones in groups.items() if ones
        ),
    )


def _entry(one: Remedy) -> str:
    facts = [
        f"**What it does.** {_sentence(_capital(one.title))}",
        f"**For** {', '.join(f'`{name}`' for name in one.addresses)}.",
        f"**Formula.** {_sentence(one.formula)}",
        f"**Exactness.** {one.exactness}. {_loading(one)}",
        f"**Cost.** {_sentence(_capital(one.cost))}",
    ]
    parameters = _table(
        ("parameter", "default", "accepts", "what it is"),
        [(f"**{each.name}**", _default(each), each.range, each.says) for each in one.parameters],
    )
    limits = "\n".join(f"- {_plain(limit)}" for limit in one.limits)
    papers = "; ".join(map(_paper, one.papers))
    return "\n\n".join(
        [
            f"### {one.name}",
            "\n".join(f"- {fact}" for fact in facts),
            parameters if one.parameters else "It has no parameters.",
            f"Limits:\n\n{limits}",
            f"From: {papers}.",
        ]
    )


def _loading(one: Remedy) -> str:
    """Whether weights that were saved with it load into a plain model."""
    values = {each.name: each.default for each in one.parameters}
    if not one.structural:
        return "Weights that are saved with it load into a plain model."
    told = " and ".join(f"{name} = {_word(value)}" for name, value in one.only_weights.items())
    if not told:
        return "Weights that are saved with it load into a repaired model alone."
    with_it, without = "into a plain model", "into a repaired model alone"
    if one.is_structural(values):
        return f"Weights that are saved with it load {without}; where {told}, {with_it}."
    return f"Weights that are saved with it load {with_it} where {told}, and else {without}."


def _default(one: Parameter) -> str:
    return _word(one.default)


def _word(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return ", ".join(map(_word, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _candidate(text: str) -> str:
    name, mark, told = text.partition("?")
    return _link(name) + (f" ({told.replace('&', ', ')})" if mark else "")


def _link(name: str) -> str:
    return f"[{name}](#{name})"


def _capital(words: str) -> str:
    return words[:1].upper() + words[1:]


def _sentence(words: str) -> str:
    words = _plain(words)
    return words if words.endswith((".", ")")) else f"{words}."


def _plain(words: str) -> str:
    """With nothing that markdown would read as its own; what docstrings put in backticks is a parameter's name."""
    words = re.sub(r"`([a-z_]+)`", r"**\1**", words)
    return re.sub(r"(?<!\*)\*(?!\*)|[_<]", lambda found: f"\\{found[0]}", words)


def _paper(words: str) -> str:
    return re.sub(r"arXiv (\d{4}\.\d{4,5})", r"[arXiv \1](https://arxiv.org/abs/\1)", _plain(words.rstrip(".")))


def _table(heads: tuple[str, ...], rows: Any) -> str:
    lines = [heads, ("---",) * len(heads), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def _cell(words: str) -> str:
    """On one line, without what ends a cell."""
    words = words if words.startswith(("`", "[", "**", "---")) else _plain(words)
    return words.replace("|", "\\|").replace("\n", " ")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)
