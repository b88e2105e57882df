"""The job of `predict`: the architecture, what theory says of it, a map over its fields, the measurement beside it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import typer
from numpy.typing import NDArray

from fullrank.architecture import Architecture
from fullrank.cli.outputs import tell_page
from fullrank.cli.progress import progress
from fullrank.errors import TheoryError
from fullrank.report import Report
from fullrank.report.agreement import of_overlaid
from fullrank.report.overlay import Overlay
from fullrank.spec import inputs
from fullrank.verbs.architecture_from_model import architecture_from_model
from fullrank.verbs.load_repaired import loaded
from fullrank.verbs.predict import predict

__all__ = ["run", "varied"]

_MOST = 100_000  # points of a map


def run(
    spec: str,
    *,
    context: int | None,
    theories: Sequence[str] | None,
    vary: Sequence[str],
    overlay: bool,
    seed: int,
    html: Path | None,
    json: bool,
) -> None:
    """Predict, and show what was asked for: a report, a map, or a report over a measurement.

    Args:
        spec: which model.
        context: tokens in a sequence.
        theories: keys; None for all.
        vary: `name=low:high:points`, one or two of them, for a map.
        overlay: also measure the model at its own initialisation.
        seed: of the draw.
        html: where the page goes; checked by the caller to be writable.
        json: print JSON and nothing else on standard output.

    Raises:
        TheoryError: for `vary` with `overlay` or with `theories`, or words that are no range.
    """
    if vary and overlay:
        raise TheoryError("--vary draws a map and --overlay a measurement: give one of them.")
    if vary and theories is not None:
        raise TheoryError("--vary draws the map of one theory and --theories chooses for a report: give one of them.")
    fields = varied(vary)
    with progress(shown=not json) as tell:
        tell(f"reading {spec}", 0.0)
        if overlay:
            shown: Any = _overlaid(spec, context=context, theories=theories, seed=seed, tell=tell)
        elif fields:
            from fullrank.verbs.trainability import trainability

            shown = trainability(Architecture.from_config(spec, context=context, seed=seed), vary=fields)
        else:
            shown = predict(spec, context=context, theories=theories, seed=seed)
        if html is not None:
            tell(f"writing {html}", 1.0)
            shown.save_html(html)
    if json:
        typer.echo(_json(shown))
    elif isinstance(shown, Report):
        shown.print(page_written=html is not None)
    else:
        from rich.console import Console

        Console().print(shown)
        if isinstance(shown, Overlay) and (said := of_overlaid(shown.reports)):
            typer.echo(f"\n{said}")
    tell_page(html, json=json)


def varied(words: Sequence[str]) -> dict[str, NDArray[np.float64]]:
    """Fields and their values from `name=low:high:points`: 50 points where none are said, in equal steps or ratios.

    Args:
        words: of the command line.

    Returns:
        Values by name; in equal ratios where both ends are positive and more than a factor of five apart.

    Raises:
        TheoryError: for words that are no such range.
    """
    found: dict[str, NDArray[np.float64]] = {}
    for one in words:
        name, _, values = one.partition("=")
        parts = values.split(":")
        try:
            low, high, points = float(parts[0]), float(parts[1]), int(parts[2]) if len(parts) > 2 else 50
            good = len(parts) <= 3 and low < high and points >= 2 and math.isfinite(low) and math.isfinite(high)
        except (ValueError, IndexError):
            good = False
        if not good:
            raise TheoryError(f"--vary {one!r} must be name=low:high:points, such as residual_scale=0.1:2:50.")
        if name in found:
            raise TheoryError(f"--vary names {name!r} twice.")
        ratio = low > 0 and high > 5 * low
        found[name] = np.geomspace(low, high, points) if ratio else np.linspace(low, high, points)
    if math.prod(len(values) for values in found.values()) > _MOST:
        raise TheoryError(f"--vary asks for more than {_MOST:,} points: give fewer.")
    return found


def _overlaid(spec: str, *, context: int | None, theories: Sequence[str] | None, seed: int, tell: Any) -> Overlay:
    """The prediction from the model that is measured: its own weights, and the correlation of its own batch."""
    from fullrank.spec.quiet import quiet
    from fullrank.verbs.examine import examine

    subject = loaded(spec, init=True, seed=seed)
    given = inputs(subject, context=context, seed=seed)
    with quiet():
        architecture = architecture_from_model(subject, given)
        predicted = predict(architecture, theories=theories)
        measured = examine(subject, given, spectrum=False, reference=False, seed=seed, progress=tell)
    return Overlay.of((measured, predicted), labels=("measured", "predicted"))


def _json(shown: Any) -> str:
    if isinstance(shown, Overlay):
        from fullrank.report import document

        return document.dumps([document.content(one) for one in shown.reports])
    return str(shown.to_json())
