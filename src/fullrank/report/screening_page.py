"""The page of a screening: what came out, the table, differences in loss, profiles before and after."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fullrank.report.embedded import script_safe
from fullrank.report.glossary import term
from fullrank.report.page import rendered, text_of_template
from fullrank.report.screening_columns import columns
from fullrank.report.screening_figure import differences, metrics_of, profiles
from fullrank.report.screening_words import MEANINGS
from fullrank.report.style import TEMPLATE
from fullrank.report.wording import number

if TYPE_CHECKING:
    from fullrank.report.screening import Screening

__all__ = ["screening_page"]


def screening_page(screening: Screening) -> str:
    """One HTML document: styles, scripts and data inside, nothing asked of the network.

    Args:
        screening: what to show.

    Returns:
        The document.
    """
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    metrics = metrics_of(screening)
    data: dict[str, Any] = {
        "template": TEMPLATE,
        "differences": differences(screening) if any(row.change for row in screening.rows) else None,
        "profiles": {metric: profiles(screening, metric) for metric in metrics},
        "meanings": {metric: term(metric).definition for metric in metrics},
    }
    return rendered(
        "screening.html",
        title=str(screening.about.get("model") or "screening"),
        screening=screening,
        sections=_sections(screening),
        facts=_facts(screening),
        metrics=[(metric, term(metric).title) for metric in metrics],
        notes=[*screening.notes, *(f"{row.variant}: {row.note}" for row in screening.rows if row.note)],
        number=number,
        columns=[one for one in columns(screening) if one.name != "exactness"],
        differences=data["differences"] is not None,
        css=Markup(text_of_template("page.css")),
        plotly=Markup(get_plotlyjs()),
        json=Markup(script_safe(data)),
    )


def _sections(screening: Screening) -> list[tuple[str, str, list[Any]]]:
    """Heading, explanation and rows of each part of the table."""
    if screening.ranked:
        return [("", "", list(screening.rows))]
    parts: list[tuple[str, str, list[Any]]] = [("", "", [screening.as_it_is])]
    return parts + [(group, MEANINGS[group], list(rows)) for group, rows in screening.groups().items()]


def _facts(screening: Screening) -> list[tuple[str, str]]:
    """What was done, in the order of reading."""
    about = screening.about
    found: list[tuple[str, Any]] = [
        (name, about.get(name)) for name in ("architecture", "weights", "input", "task", "seeds", "seconds")
    ]
    if about.get("chance") is not None:
        found.append(("chance", f"{number(float(about['chance']))} nats: the loss of who knows nothing of the input"))
    if screening.ranked:
        found.append(("steps", screening.steps))
    said = [(name, ", ".join(map(str, v)) if isinstance(v, list) else v) for name, v in found if v is not None]
    return [(name, f"{v:.1f}" if isinstance(v, float) else str(v)) for name, v in said if not isinstance(v, dict)]
