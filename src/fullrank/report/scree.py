"""The singular values of one head against their rank fraction, over the bulk that random rows would give."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fullrank.errors import TableError
from fullrank.report.series import Series
from fullrank.report.spectrum import HeadSpectrum, quarter_circle
from fullrank.report.style import ACCENT, COLOURS, MUTED, Spec, drawable, escaped
from fullrank.report.wording import number

__all__ = ["scree", "sketch"]

_CURVE = 80
_SHOWN = 160
"""At most so many points per curve: the first half one by one, the rest evenly spaced."""


def scree(
    series: Sequence[Series],
    layer: int,
    head: int,
    *,
    stack: str | None = None,
    part: str | None = None,
    logarithmic: bool = False,
) -> Spec:
    """The spectra of one head, of every series that has it.

    Returns:
        The figure.

    Raises:
        TableError: where no spectrum of that head was kept, or several are meant.
    """
    found: list[tuple[Series, HeadSpectrum]] = []
    for one in series:
        for spectrum in one.spectra:
            wanted = (stack in (None, spectrum.stack)) and (part in (None, spectrum.part))
            if (spectrum.layer, spectrum.head) == (layer, head) and wanted:
                found.append((one, spectrum))
    if not found:
        kept = [f"{s.layer}.{s.head}" for one in series for s in one.spectra]
        have = f"{', '.join(kept[:8])}{', …' if len(kept) > 8 else ''}" if kept else "none"
        raise TableError(f"no spectrum of layer={layer}, head={head} was kept; there are (layer.head): {have}.")
    places = sorted({(spectrum.stack, spectrum.part) for _, spectrum in found})
    if len(places) > 1:
        raise TableError(f"layer={layer}, head={head} stands for several spectra: {places}; pass stack= or part=.")
    return sketch(found, logarithmic=logarithmic)


def sketch(found: Sequence[tuple[Series, HeadSpectrum]], *, logarithmic: bool = False) -> Spec:
    """Draw spectra of one head: values as points, permuted rows as a grey line, the quarter circle dashed."""
    data: list[Spec] = []
    for index, (one, spectrum) in enumerate(found):
        colour = COLOURS[index % len(COLOURS)]
        data += _traces(spectrum, one.label, colour, bidirectional=spectrum.stack not in one.causal)
    _, first = found[0]
    said = f"layer {first.layer}, head {first.head} · {first.stack} · {first.part}"
    if len(found) == 1:
        said += f" · {_summary(first)}"
    layout: Spec = {
        "height": 430,
        "showlegend": True,
        "title": {"text": escaped(said), "font": {"size": 12, "color": MUTED}, "x": 0, "xref": "paper", "y": 0.985},
        "margin": {"l": 60, "r": 24, "t": 84, "b": 52},
        "meta": {"said": said},
        "xaxis": {"title": {"text": f"rank fraction (of {first.tokens} singular values)"}, "range": [-0.02, 1.02]},
        "yaxis": {"title": {"text": "singular value of A"}, "type": "log" if logarithmic else "linear"},
    }
    if not first.complete:
        last = (len(first.values) + 0.5) / first.tokens
        layout["xaxis"]["range"] = [-0.02 * last, max(4 * last, 0.02)]
    if not logarithmic:
        layout["yaxis"]["rangemode"] = "tozero"
    return {"data": data, "layout": layout}


def _summary(spectrum: HeadSpectrum) -> str:
    leading = ", ".join(f"s{'₁₂'[i]} = {number(s)}" for i, s in enumerate(spectrum.values[:2]))
    said = [leading] if leading else []
    if spectrum.outliers is not None:
        said.append(f"edge {number(spectrum.edge)}, {spectrum.outliers} beyond it after s₁")
    if not spectrum.complete:
        said.append(f"leading {len(spectrum.values)} of {spectrum.tokens}")
    return " · ".join(said)


def _traces(spectrum: HeadSpectrum, label: str, colour: str, *, bidirectional: bool) -> list[Spec]:
    T = spectrum.tokens
    prefix = escaped(f"{label} · " if label else "")
    traces: list[Spec] = []
    if spectrum.null is not None:
        traces.append(
            _curve(spectrum.null, T)
            | {"mode": "lines", "line": {"color": colour if label else "#9a9a93", "width": 5}, "opacity": 0.3}
            | {"name": f"{prefix}permuted rows"}
            | {"hovertemplate": "permuted rows: %{y:.3g} at rank %{customdata}<extra></extra>"}
        )
    edge = spectrum.edge
    if not math.isnan(edge) and edge > 0 and T > 1:
        step = (T - 1) / _CURVE / T
        name = f"random bulk, edge {number(edge)}" + ("" if bidirectional else " (were all keys visible)")
        traces.append(
            {
                "type": "scatter",
                "mode": "lines",
                "x": [drawable(1 / T + (k + 0.5) * step) for k in range(_CURVE)],
                "y": [drawable(edge * quantile) for quantile in quarter_circle(_CURVE)],
                "line": {"color": ACCENT if not label else colour, "width": 1.6, "dash": "dash"},
                "name": f"{prefix}{name}",
                "hovertemplate": "independent rows: %{y:.3g} at rank fraction %{x:.2f}<extra></extra>",
            }
        )
    traces.append(
        _curve(spectrum.values, T)
        | {"mode": "markers", "marker": {"color": colour, "size": 5 if T > 64 else 7}}
        | {"name": f"{prefix}measured", "legendrank": 1}
        | {"hovertemplate": f"<b>%{{y:.4g}}</b> at rank %{{customdata}}<extra>{escaped(label)}</extra>"}
    )
    return traces


def _curve(values: tuple[float, ...], tokens: int) -> Spec:
    ranks = _ranks(len(values))
    return {
        "type": "scatter",
        "x": [drawable((rank - 0.5) / tokens) for rank in ranks],
        "y": [drawable(values[rank - 1]) for rank in ranks],
        "customdata": ranks,
        "line": {"color": MUTED},
    }


def _ranks(count: int) -> list[int]:
    if count <= _SHOWN:
        return list(range(1, count + 1))
    half = _SHOWN // 2
    step = (count - half) / half
    return [*range(1, half + 1), *(min(count, round(half + step * (k + 1))) for k in range(half))]
