r"""The random-Markov model of attention, layer by layer of an architecture (mind_the_gap, arXiv 2410.07799).

Logits' standard deviation s and tokens' cosine ρ of every layer are those of the (q, p) map (`giorlandino_goldt`). With
Y₂(s, T) of a row, O the overlap of two rows whose logits correlate by ρ, and $\tau^2 = Y_2 - O$ what is a row's own:

- `attention_s1`: a spike $\theta^2 = TO$ on a bulk of mean τ²; `contrast_gain`: $\sqrt{\tau^2 + c}$ with
  $c = (1-\rho)s^2/d$, as values read the channels that keys are read from; `branch_energy` with s²/d, as what
  all rows prefer alike counts there.
- `attention_s2`, `smoothing_gain`: the edge of `key_query_bulk`, as heads are narrower than the context is long;
  `bulk_excess`: that edge over the one of independent rows.
- Causal attention, late queries: averaging's own singular values (`mind_the_gap_causal`), to which noise is added like
  to a spike of a rectangular matrix; over all queries nothing is said, as the first rows decide there.
"""

from __future__ import annotations

import math
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

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


Array = NDArray[np.float64]


class _Carried(NamedTuple):
    """What one row of logits carries, and two share, by layer.

    Attributes:
        own: τ², energy of a row that no other row has.
        common: O.
        linear: the part of τ² that lies in the channels of the head.
        shared: c of what rows carry alone.
        response: s²/d, the same of all that a row carries.
        correlation: ρ.
    """

    own: Array
    common: Array
    linear: Array
    shared: Array
    response: Array
    correlation: Array


def layer_rows(architecture: Architecture) -> list[Row]:
    """Rows of site `attention`, part `self`, as the mean over heads, at the headline scope.

    Args:
        architecture: of which model.

    Returns:
        Nine metrics a layer (eight for causal attention), from layer 1.
    """
    block = BlockMap.of(parameters_of(architecture))
    causal = architecture.mask == "causal"
    of_state = late if causal else everywhere
    spreads: list[float] = []
    correlations: list[float] = []
    for layer in layers(block):
        if layer.attended is not None:
            spreads.append(float(layer.attended.logit_std[-1]))
        correlations.append(min(max(float(of_state(block, layer.out)[0]), 0.0), 1.0))
    carried = _carried(architecture, np.array(spreads), np.array(correlations[:-1]))
    by_metric = _late(architecture, carried) if causal else _full(architecture, carried)
    scope = "late" if causal else "all"
    return [
        Row(
            architecture.stack, layer, "attention", "self", metric, float(value), scope=scope, n=None, exact=False,
            source="theory:mind_the_gap",
        )
        for metric, values in by_metric.items()
        for layer, value in enumerate(values.tolist(), 1)
        if math.isfinite(value)
    ]  # fmt: skip


def _carried(architecture: Architecture, s: Array, rho: Array) -> _Carried:
    """Of rows of T visible keys; shorter rows carry T/t times as much."""
    T = float(architecture.context)
    Y2 = inverse_participation(s, T)
    common = row_overlap(Y2, rho, T, head_width=float(architecture.head_width or 1))
    own = np.maximum(Y2 - common, 0.0)
    linear, d = (1 - rho) * s**2, architecture.width
    return _Carried(own, common, np.minimum(linear / T, own), linear / d, s**2 / d, rho)


def _narrow_edge(architecture: Architecture, carried: _Carried) -> Array:
    """Of the bulk of key–query maps."""
    head = float(architecture.head_width or 1)
    ratio, narrowing = head / architecture.context, head / architecture.width
    return key_query_edge(carried.linear, carried.own - carried.linear, ratio=ratio, narrowing=narrowing)


def _full(architecture: Architecture, carried: _Carried) -> dict[str, Array]:
    T, rho = float(architecture.context), carried.correlation
    edge = _narrow_edge(architecture, carried)
    Y2 = carried.own + carried.common
    leading = spiked(T * carried.common, carried.own)
    share = np.minimum(leading / (T * Y2), 1.0)
    excess = Y2 - 1 / T
    rest = excess + carried.response
    null = np.where(excess > 0, 2 * np.sqrt(np.maximum(excess, 1e-300)), np.nan)
    return {
        "attention_s1": np.sqrt(leading),
        "attention_s2": edge,
        "outlier_share": share,
        "attention_stable_rank": 1 / share,
        # what all rows prefer alike is a spike of its own once plain averaging is taken off
        "uniform_distance": np.maximum(edge, np.sqrt(spiked(T * carried.common - 1, carried.own))),
        "smoothing_gain": edge,
        "bulk_excess": edge / null,
        "branch_energy": (1 - rho) * rest / (rho + (1 - rho) * (rest + 1 / T)),
        "contrast_gain": np.sqrt(carried.own + carried.shared),
    }


def _late(architecture: Architecture, carried: _Carried) -> dict[str, Array]:
    T, rho = float(architecture.context), carried.correlation
    whole = T * (carried.own + carried.common) - 1  # σ², of which T O − 1 is alike in all rows
    alike = np.maximum(T * carried.common - 1, 0.0)
    longer = 2 * math.log(2)  # T times the mean of 1/t over late rows
    noise = longer * carried.own  # τ² of a late row
    edge = _late_edge(architecture, carried)
    first, second = late_averaging(np.array([1, 2]), tokens=T).tolist()
    one = _with_noise(first * np.sqrt(1 + alike), noise, edge)
    share = np.minimum(one**2 / (math.log(2) * (1 + whole)), 1.0)  # ‖A‖_F² of the late rows
    rest = longer * whole / T + carried.response
    return {
        "attention_s1": one,
        "attention_s2": _with_noise(second, noise, edge),
        "outlier_share": share,
        "attention_stable_rank": 1 / share,
        "uniform_distance": _with_noise(np.sqrt(math.log(2) * alike), noise, edge),
        "smoothing_gain": _with_noise(late_averaging_centred(1, tokens=T), noise, edge),
        "branch_energy": (1 - rho) * rest / (rho + (1 - rho) * (rest + longer / T)),
        "contrast_gain": causal_contrast_gain(np.sqrt(T * carried.own), tokens=T, shared=carried.shared),
    }


def _late_edge(architecture: Architecture, carried: _Carried) -> Array:
    # over that of a full map: √½ for few channels (the block of late rows and early keys, which the mask leaves whole,
    # has half the energy), half the constant of `late_edge` for many; a line between, within a twentieth of simulation
    full = _narrow_edge(architecture, carried)
    wide = np.minimum(2 * np.sqrt(carried.own) / np.maximum(full, 1e-300), 1.0)
    few, many = math.sqrt(0.5), float(late_edge(1.0, tokens=1.0)) / 2
    return np.asarray(full * (few + (many - few) * wide))


def _with_noise(spike: ArrayLike, noise: Array, edge: Array) -> Array:
    r"""$\sqrt{(\theta^2+\tau^2)(\theta^2+\tau^2/2)}/\theta$ of a spike in T/2 × T entries, while above the bulk."""
    theta = np.asarray(spike, float)
    above = theta**4 > noise**2 / 2
    moved = np.sqrt((theta**2 + noise) * (theta**2 + noise / 2)) / np.where(above, theta, 1.0)
    return np.where(above, np.maximum(moved, edge), edge)
