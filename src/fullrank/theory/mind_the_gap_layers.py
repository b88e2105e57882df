r"""The random-Markov model of attention, layer by layer of an architecture (mind_the_gap, arXiv 2410.07799).

Logits' standard deviation s and tokens' cosine ρ of every layer are those of the (q, p) map (`giorlandino_goldt`). With
Y₂(s, T) of a row, O the overlap of two rows whose logits correlate by ρ, and $\tau^2 = Y_2 - O$ what is a row's own:

- `attention_s1`: a spike $\theta^2 = TO$ on a bulk of mean τ²; `contrast_gain`: $\sqrt{\tau^2 + c}$ with
  $c = (1-\rho)s^2/d$, as values read the channels that keys are read from; `branch_energy` with the same c.
- `attention_s2`, `smoothing_gain`: the edge of `key_query_bulk`, as heads are narrower than the context is long;
  `bulk_excess`: that edge over the one of independent rows.
- Causal attention, late queries: averaging's own singular values (`mind_the_gap_causal`), to which noise is added like
  to a spike of a rectangular matrix; over all queries nothing is said, as the first rows decide there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Final, NamedTuple

import numpy as np

from fullrank.architecture import Architecture
from fullrank.table import Row
from fullrank.theory.giorlandino_goldt_course import everywhere, late, layers
from fullrank.theory.giorlandino_goldt_map import BlockMap
from fullrank.theory.giorlandino_goldt_parameters import parameters_of
from fullrank.theory.key_query_bulk import key_query_edge
from fullrank.theory.mind_the_gap_causal import (
    causal_contrast_gain,
    late_averaging,
    late_averaging_centred,
    late_edge,
)
from fullrank.theory.mind_the_gap_spectra import spiked
from fullrank.theory.random_energy import inverse_participation, row_overlap

__all__ = ["GIVES", "layer_rows"]

GIVES: Final = (
    "attention_s1",
    "attention_s2",
    "outlier_share",
    "attention_stable_rank",
    "uniform_distance",
    "smoothing_gain",
    "bulk_excess",
    "branch_energy",
    "contrast_gain",
)


class _Rows(NamedTuple):
    """What one row of logits carries, and two share.

    Attributes:
        own: τ², energy of a row that no other row has.
        common: O.
        linear: the part of τ² that lies in the channels of the head.
        shared: c.
        correlation: ρ.
    """

    own: float
    common: float
    linear: float
    shared: float
    correlation: float


def layer_rows(architecture: Architecture) -> list[Row]:
    """Rows of site `attention`, part `self`, as the mean over heads, at the headline scope.

    Args:
        architecture: of which model.

    Returns:
        Nine metrics a layer, from layer 1.
    """
    block = BlockMap.of(parameters_of(architecture))
    causal = architecture.mask == "causal"
    of_state = late if causal else everywhere
    rows: list[Row] = []
    rho = 0.0
    for number, layer in enumerate(layers(block)):
        if layer.attended is not None:
            carried = _carried(architecture, float(layer.attended.logit_std[-1]), rho)
            numbers = _late(architecture, carried) if causal else _full(architecture, carried)
            scope = "late" if causal else "all"
            rows += [
                Row(
                    architecture.stack, number, "attention", "self", metric, value, scope=scope, n=None, exact=False,
                    source="theory:mind_the_gap",
                )
                for metric, value in numbers
                if math.isfinite(value)
            ]  # fmt: skip
        rho = min(max(float(of_state(block, layer.out)[0]), 0.0), 1.0)
    return rows


def _carried(architecture: Architecture, s: float, rho: float) -> _Rows:
    """Of rows of T visible keys; shorter rows carry T/t times as much."""
    T = float(architecture.context)
    Y2 = inverse_participation(s, T)
    common = float(row_overlap(Y2, rho, T, head_width=float(architecture.head_width or 1)))
    own = max(float(Y2) - common, 0.0)
    linear = (1 - rho) * s * s
    return _Rows(own, common, min(linear / T, own), linear / architecture.width, rho)


def _narrow_edge(architecture: Architecture, carried: _Rows) -> float:
    """Of the bulk of key–query maps."""
    head = float(architecture.head_width or 1)
    ratio, narrowing = head / architecture.context, head / architecture.width
    return float(key_query_edge(carried.linear, carried.own - carried.linear, ratio=ratio, narrowing=narrowing))


def _full(architecture: Architecture, carried: _Rows) -> Iterator[tuple[str, float]]:
    T, rho = float(architecture.context), carried.correlation
    edge = _narrow_edge(architecture, carried)
    Y2 = carried.own + carried.common
    leading = float(spiked(T * carried.common, carried.own))
    yield "attention_s1", math.sqrt(leading)
    yield "attention_s2", edge
    yield "outlier_share", min(leading / (T * Y2), 1.0)
    yield "attention_stable_rank", max(T * Y2 / leading, 1.0)
    # what all rows prefer alike is a spike of its own once plain averaging is taken off
    yield "uniform_distance", max(edge, math.sqrt(float(spiked(T * carried.common - 1, carried.own))))
    yield "smoothing_gain", edge
    yield "bulk_excess", edge / (2 * math.sqrt(max(Y2 - 1 / T, 0.0))) if Y2 > 1 / T else math.nan
    rest = Y2 - 1 / T + carried.shared
    yield "branch_energy", (1 - rho) * rest / (rho + (1 - rho) * (Y2 + carried.shared))
    yield "contrast_gain", math.sqrt(carried.own + carried.shared)


def _late(architecture: Architecture, carried: _Rows) -> Iterator[tuple[str, float]]:
    T, rho = float(architecture.context), carried.correlation
    whole = T * (carried.own + carried.common) - 1  # σ², of which T O − 1 is alike in all rows
    alike = max(T * carried.common - 1, 0.0)
    longer = 2 * math.log(2)  # T times the mean of 1/t over late rows
    noise = longer * carried.own  # τ² of a late row
    edge = _late_edge(architecture, carried)
    first, second = late_averaging(np.array([1, 2]), tokens=T).tolist()
    one = _with_noise(first * math.sqrt(1 + alike), noise, edge)
    energy = math.log(2) * (1 + whole)  # ‖A‖_F² of the late rows
    yield "attention_s1", one
    yield "attention_s2", _with_noise(second, noise, edge)
    yield "outlier_share", min(one**2 / energy, 1.0)
    yield "attention_stable_rank", max(energy / one**2, 1.0)
    yield "uniform_distance", _with_noise(math.sqrt(math.log(2) * alike), noise, edge)
    yield "smoothing_gain", _with_noise(float(late_averaging_centred(1, tokens=T)), noise, edge)
    rest = longer * whole / T + carried.shared
    yield "branch_energy", (1 - rho) * rest / (rho + (1 - rho) * (rest + longer / T))
    yield "contrast_gain", float(causal_contrast_gain(math.sqrt(T * carried.own), tokens=T, shared=carried.shared))


def _late_edge(architecture: Architecture, carried: _Rows) -> float:
    # over that of a full map: √½ for few channels (the block of late rows and early keys, which the mask leaves whole,
    # has half the energy), half the constant of `late_edge` for many; a line between, within a twentieth of simulation
    full = _narrow_edge(architecture, carried)
    wide = 2 * math.sqrt(carried.own) / full if full > 0 else 1.0
    few, many = math.sqrt(0.5), float(late_edge(1.0, tokens=1.0)) / 2
    return full * (few + (many - few) * min(wide, 1.0))


def _with_noise(spike: float, noise: float, edge: float) -> float:
    r"""$\sqrt{(\theta^2+\tau^2)(\theta^2+\tau^2/2)}/\theta$ of a spike in T/2 × T entries, while above the bulk."""
    if spike**4 <= noise**2 / 2:
        return edge
    return max(math.sqrt((spike**2 + noise) * (spike**2 + noise / 2)) / spike, edge)
