"""A map of what trains: phases over one or two fields of an architecture, with its own place marked."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fullrank.architecture.shorthands import SHORTHANDS
from fullrank.report.document import dumps
from fullrank.report.figure import as_figure
from fullrank.report.terminal_prediction import plain_words
from fullrank.report.wording import number
from fullrank.table import write_atomically

if TYPE_CHECKING:
    import pandas
    from plotly.graph_objects import Figure
    from rich.console import Console, ConsoleOptions, RenderableType

__all__ = ["MEANINGS", "SIGNS", "Axis", "TrainabilityMap"]

SIGNS = (".", "#", "*", "!")
MEANINGS = {
    "trainable": "tokens stay apart over the whole depth, and each query chooses among many keys",
    "rank-collapsed": "tokens have merged after the last block: a stronger skip or weaker branches keep them apart",
    "entropy-collapsed": "in some block the softmax rests on few keys: a smaller scale of the logits repairs it, or "
    "smaller W_Q and W_K unless queries and keys are normed; where blocks read a norm, no residual does",
    "unbounded": "the stream's root mean square after the last block is 1e27 or more: norms or weaker branches help",
}


@dataclass(frozen=True)
class Axis:
    """A field that varies.

    Attributes:
        name: of a field or a shorthand.
        values: that it takes.
        own: the architecture's own; None where it has none, or several.
    """

    name: str
    values: NDArray[np.float64]
    own: float | None

    @property
    def logarithmic(self) -> bool:
        """Whether values are positive and span more than a factor of five."""
        return bool((self.values > 0).all() and self.values.max() > 5 * self.values.min())

    def nearest(self) -> int | None:
        """Index of the value nearest to the architecture's own; None where that lies outside, or is unknown."""
        if self.own is None or not self.values.min() <= self.own <= self.values.max():
            return None
        if self.logarithmic:
            return int(np.abs(np.log(self.values / self.own)).argmin())
        return int(np.abs(self.values - self.own).argmin())


@dataclass(frozen=True)
class TrainabilityMap:
    """Phases over one or two axes.

    Attributes:
        architecture: in words.
        axes: one or two.
        phases: names of the phases.
        phase: index into `phases` at every point, of the axes' shape.
        similarity: of tokens after the last block.
        gauge: largest of any block: logits' spread over √log of the keys.
    """

    architecture: str
    axes: tuple[Axis, ...]
    phases: tuple[str, ...]
    phase: NDArray[np.intp]
    similarity: NDArray[np.float64]
    gauge: NDArray[np.float64]

    @property
    def here(self) -> str | None:
        """The phase at the point that is nearest to the architecture's own place; None where that is not on the map."""
        places = [axis.nearest() for axis in self.axes]
        if any(place is None for place in places):
            return None
        return self.phases[int(self.phase[tuple(int(place or 0) for place in places)])]

    def shares(self) -> dict[str, float]:
        """What part of the points each phase has."""
        return {name: float((self.phase == index).mean()) for index, name in enumerate(self.phases)}

    def idle(self) -> tuple[str, ...]:
        """Axes along which nothing changes: a field that this architecture does not use, or of no weight here."""
        found = []
        for at, axis in enumerate(self.axes):
            numbers = (self.phase, self.similarity, self.gauge)
            if all((np.ptp(one, at) <= 1e-9 * np.abs(one).max(at)).all() for one in numbers):
                found.append(axis.name)
        return tuple(found)

    @property
    def table(self) -> pandas.DataFrame:
        """One line a point: the fields' values, phase, similarity, gauge."""
        import pandas

        grids = np.meshgrid(*(axis.values for axis in self.axes), indexing="ij")
        columns: dict[str, Any] = {axis.name: grid.ravel() for axis, grid in zip(self.axes, grids, strict=True)}
        columns["phase"] = [self.phases[index] for index in self.phase.ravel()]
        return pandas.DataFrame(columns | {"similarity": self.similarity.ravel(), "gauge": self.gauge.ravel()})

    def to_json(self) -> str:
        """One JSON document: the axes, and the arrays in their shape."""
        return dumps(
            {
                "architecture": self.architecture,
                "axes": [{"name": a.name, "values": a.values.tolist(), "own": a.own} for a in self.axes],
                "phases": list(self.phases),
                "here": self.here,
                "phase": self.phase.tolist(),
                "similarity": np.round(self.similarity, 6).tolist(),
                "gauge": np.round(self.gauge, 6).tolist(),
            }
        )

    # ---------------------------------------------------------------- files and display

    def figure(self) -> Figure:
        """Of two fields a plane coloured by phase, lines of equal similarity on it; of one the similarity along it."""
        from fullrank.report.trainability_figure import drawn

        return as_figure(drawn(self))

    def to_html(self) -> str:
        """A page with the figure, which asks nothing of the network."""
        from fullrank.report.page import map_page

        return map_page(self)

    def save_html(self, path: str | os.PathLike[str]) -> Path:
        """Write the page to a file, whole or not at all."""
        return write_atomically(path, self.to_html())

    @property
    def said(self) -> str:
        """How many points each phase has, where the architecture itself stands, and which field changes nothing."""
        parts = ", ".join(f"{name} {100 * share:.0f} %" for name, share in self.shares().items() if share)
        idle = "".join(
            f" {name} makes no difference here: all its values give the same phase, similarity and gauge."
            for name in self.idle()
        )
        return (
            f"Of {self.phase.size:,} points: {parts}; the architecture itself {self._own()}.{idle} By the mean-field "
            "map of arXiv 2505.24333, at initialisation."
        )

    def _own(self) -> str:
        if self.here is not None:
            place = ", ".join(f"{axis.name} {number(axis.own)}" for axis in self.axes)
            return f"is {self.here} ({place})"
        without = [axis.name for axis in self.axes if axis.own is None]
        if without:
            has = [f"several values of {name}" if name in SHORTHANDS else f"no {name}" for name in without]
            return f"has no place on this map: it has {' and '.join(has)}"
        return f"lies outside ({', '.join(f'{axis.name} {number(axis.own)}' for axis in self.axes)})"

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        from rich.text import Text

        said = plain_words if options.ascii_only else str
        yield Text(said(f"{self.architecture}."), overflow="fold")
        yield Text(said(f"\n{self.said}\n"), overflow="fold")
        yield from (Text(said(line), no_wrap=True) for line in self._drawn(min(options.max_width - 12, 72)))
        found = [index for index in range(len(self.phases)) if (self.phase == index).any()]
        signs = [f"{SIGNS[index]} {self.phases[index]}" for index in found]
        if self.here is not None:
            signs.append("@ this architecture")
        yield Text("\n" + "   ".join(signs), style="dim")

    def _drawn(self, width: int) -> Iterator[str]:
        """The map in characters: the first axis to the right, the second up."""
        across, up = self.axes[0], self.axes[1] if len(self.axes) == 2 else None
        columns = np.unique(np.linspace(0, len(across.values) - 1, min(width, len(across.values))).astype(int))
        lines = (
            [0] if up is None else np.unique(np.linspace(0, len(up.values) - 1, min(20, len(up.values))).astype(int))
        )
        own = across.nearest()
        column = None if own is None else int(np.abs(columns - own).argmin())
        beside = 0 if up is None else up.nearest()
        row = None if beside is None else int(np.abs(np.asarray(lines) - beside).argmin())
        for index in range(len(lines) - 1, -1, -1):
            phase = self.phase if up is None else self.phase[:, lines[index]]
            signs = [SIGNS[int(phase[at])] for at in columns]
            if column is not None and index == row:
                signs[column] = "@"
            label = "" if up is None else number(float(up.values[lines[index]]))
            yield f"{label:>9} {''.join(signs)}"
        first, last = (number(float(across.values[at])) for at in (0, -1))
        yield f"{'':>9} {first}{' ' * max(1, len(columns) - len(first) - len(last))}{last}"
        yield f"{'':>9} to the right {across.name}{'' if up is None else f', upwards {up.name}'}"
