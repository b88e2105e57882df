"""Numbers and facts in words, the same on the terminal, in a notebook and on the page."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any

from fullrank.table import Row, without_context

__all__ = [
    "at_floor",
    "evidence",
    "examined",
    "kernel_words",
    "model_title",
    "number",
    "row_notes",
    "scope_words",
    "weights_words",
]

MISSING = "–"


def number(value: float | None) -> str:
    """Three significant digits, three decimals below 1; – where there is none."""
    if value is None or math.isnan(value):
        return MISSING
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    size = abs(value)
    if size and not 1e-3 <= size < 99_950:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa}e{int(exponent)}".replace("-", "−")
    digits = 3 if size < 1 else max(0, 2 - math.floor(math.log10(size)))
    text = f"{value:.{digits}f}"
    return (text if float(text) else text.lstrip("-")).replace("-", "−")


def evidence(row: Row) -> str:
    """How sure the number is: standard error, how many sequences, whether anything was sampled, and its note."""
    said = []
    if row.stderr is not None:
        said.append(f"± {number(row.stderr)}")
    if row.n is not None:
        said.append(f"n = {row.n}")
    if not row.exact:
        said.append("sampled or capped")
    if row.note:
        said.append(row.note)
    return " · ".join(said)


def scope_words(scope: str) -> str:
    """What a scope was taken over, in words."""
    words = {
        "all": "all real tokens; of attention, the rows that see at least min(32, T/4) keys",
        "late": "the later half of the context",
        "no-sink": "without the keys that hold most of a head's attention, rows renormalised",
        "no-first": "all real tokens but the first of each sequence, which may be a CLS token or a register",
        "samples": "over samples instead of tokens",
    }
    own, context = without_context(scope)
    said = [words.get(part, part) for part in own.split("+")]
    return "; ".join(said if context is None else (*said, f"sequences of {context} tokens"))


def at_floor(row: Row) -> bool:
    """Whether the value is marked as standing at the float floor of the run's dtype."""
    return row.value is not None and "floor" in row.note


def model_title(about: Mapping[str, Any]) -> str:
    """The model's name as a heading: of a long path its last two parts, the whole being said below."""
    name = str(about.get("model") or about.get("architecture") or "report")
    parts = [part for part in name.split("/") if part]
    return "/".join(parts[-2:]) if len(parts) > 2 and name[0] in "/.~" else name


def examined(about: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What was examined, as (label, words); only what the description says."""
    facts = [
        ("model", _model(about)),
        ("weights", weights_words(about.get("fresh"))),
        *((f"stack {stack.get('name', '')}".strip(), _stack(stack)) for stack in about.get("stacks") or []),
        ("input", _input(about.get("input") or {})),
        ("gradients", f"of {about['gradients']}" if about.get("gradients") else ""),
        ("run", _run(about)),
        ("versions", ", ".join(f"{name} {version}" for name, version in (about.get("versions") or {}).items())),
        ("created", _moment(str(about.get("created") or ""))),
    ]
    return [(label, words) for label, words in facts if words]


_NUMBER = re.compile(r"\d[\d.,]*(?:e[+-]?\d+)?")


def row_notes(rows: Iterable[Row]) -> list[tuple[str, str]]:
    """Every note that rows carry, once, with the metrics it was said of; those of missing values come first.

    Notes that differ in their numbers alone (one for each layer) are said once, with how many more there are.

    Returns:
        Notes with the names of their metrics.
    """
    said: dict[str, dict[str, None]] = {}
    alike: dict[str, dict[str, None]] = {}
    for row in sorted((row for row in rows if row.note), key=lambda row: row.value is not None):
        pattern = _NUMBER.sub("#", row.note)
        said.setdefault(pattern, {})[row.metric] = None
        alike.setdefault(pattern, {})[row.note] = None
    found = []
    for pattern, metrics in said.items():
        first, *others = alike[pattern]
        more = f" (and {len(others)} more like it)" if others else ""
        found.append((first + more, ", ".join(metrics)))
    return found


def weights_words(fresh: Any) -> str:
    """Whether weights are the architecture's own random ones; empty where nobody said."""
    return "" if fresh is None else "freshly initialised" if fresh else "as loaded"


def kernel_words(about: Mapping[str, Any]) -> str:
    """Whether the model ran on its own kernels while it was looked at; empty where nobody said."""
    found = about.get("kernels")
    return "" if not found else f"kernels {found}" if found == "untouched" else f"kernels on a {found} (see the notes)"


def _model(about: Mapping[str, Any]) -> str:
    said = [str(about["architecture"])] if about.get("architecture") else []
    if about.get("parameters"):
        said.append(f"{_count(about['parameters'])} parameters")
    name = str(about.get("model") or "")
    return f"{name} ({', '.join(said)})" if name and said else name or ", ".join(said)


def _stack(stack: Mapping[str, Any]) -> str:
    said = [f"{stack[name]} {name}" for name in ("blocks", "heads") if stack.get(name)]
    if stack.get("width"):
        said.append(f"width {stack['width']}")
    if stack.get("causal") is not None and stack.get("heads", 1):
        said.append("causal" if stack["causal"] else "bidirectional")
    if stack.get("kernel"):
        said.append(str(stack["kernel"]))
    return ", ".join(said)


def _input(given: Mapping[str, Any]) -> str:
    kind, description = str(given.get("kind") or ""), str(given.get("description") or "")
    said = [f"{kind}: {description}" if kind and description and kind != description else kind or description]
    if given.get("sequences"):
        said.append(f"{given['sequences']} sequences")
    if given.get("tokens"):
        said.append(f"{given['tokens']} tokens")
    if given.get("context"):
        said.append(f"context {given['context']}")
    return ", ".join(words for words in said if words)


def _run(about: Mapping[str, Any]) -> str:
    said = [str(about[name]) for name in ("dtype", "device") if about.get(name)]
    if about.get("kernels"):
        said.append(kernel_words(about))
    if about.get("seed") is not None:
        said.append(f"seed {about['seed']}")
    if about.get("seconds") is not None:
        said.append(f"{float(about['seconds']):.1f} s")
    return ", ".join(said)


def _moment(iso: str) -> str:
    """`2026-11-22T04:00:00+00:00` to the minute."""
    try:
        moment = datetime.fromisoformat(iso)
    except ValueError:
        return iso
    return f"{moment:%Y-%m-%d %H:%M} {moment.tzname() or ''}".strip()


def _count(count: float) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return str(count)
