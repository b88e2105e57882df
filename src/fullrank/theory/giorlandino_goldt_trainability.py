r"""Which phase an architecture starts in, and the value of a field at which it leaves rank collapse.

The diagram of giorlandino_goldt (arXiv 2505.24333): over depth ρ → 1 (rank collapse, which the residual keeps off), or
the gauge passes √2 (entropy collapse, which it does not where blocks read a norm), or neither. Thresholds are
arguments.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fullrank.architecture import Architecture
from fullrank.theory.giorlandino_goldt_course import final, late, layers
from fullrank.theory.giorlandino_goldt_map import UNBOUNDED, BlockMap, Tokens
from fullrank.theory.giorlandino_goldt_parameters import parameters_of
from fullrank.theory.random_energy import TRANSITION

__all__ = ["PHASES", "Phases", "critical", "critical_skip", "phases"]

Array = NDArray[np.float64]

PHASES: Final = ("trainable", "rank-collapsed", "entropy-collapsed", "unbounded")

_STEPS = 30


@dataclass(frozen=True)
class Phases:
    """Of every point, arrays of the shape that the fields broadcast to.

    Attributes:
        phase: index into `PHASES`.
        similarity: ρ of late tokens after the last block.
        gauge: largest gauge of any block, b = s/√log n; √2 is the transition, √2/2 where finite contexts first show it.
    """

    phase: NDArray[np.intp]
    similarity: Array
    gauge: Array


def phases(
    architecture: Architecture,
    *,
    collapsed: float = 0.99,
    tokens: Tokens = "finite",
    centred: bool = False,
    **fields: Any,
) -> Phases:
    """Where each point of a map stands; entropy collapse is named first: no residual repairs it where a norm is read.

    Args:
        architecture: where to start from.
        collapsed: ρ of the last layer from which tokens count as one.
        tokens: `finite`, or the paper's `limit`.
        centred: whether attention's output is centred: the paper's gain control.
        **fields: arrays in place of fields, by name or shorthand, depth too; they broadcast.

    Returns:
        Phases, with the two numbers that they are read from; `unbounded` where the stream's squares reach 1e54.
    """
    block = BlockMap.of(parameters_of(architecture, **fields), tokens, centred=centred)
    depth, shape = block.parameters.depth, block.parameters.shape
    rho = q = gauge = np.zeros(shape)
    for number, layer in enumerate(layers(block)):
        here = number <= depth
        now = late(block, layer.out)
        rho, q = np.where(here, now.similarity, rho), np.where(here, now.q, q)
        if layer.attended is not None:
            b = layer.attended.logit_std[-1] / np.sqrt(np.log(np.maximum(layer.attended.keys[-1], 2.0)))
            gauge = np.where(here, np.fmax(gauge, b), gauge)
    phase = np.where(rho >= collapsed, 1, 0)
    phase = np.where(gauge > TRANSITION, 2, phase)
    phase = np.where(q < UNBOUNDED / 1e6, phase, 3)
    full = [np.broadcast_to(one, shape) for one in (phase, rho, gauge)]
    return Phases(full[0].astype(np.intp), full[1], full[2])


def critical(
    architecture: Architecture,
    name: str,
    *,
    similarity: float = 0.99,
    between: tuple[float, float] = (1e-3, 1e3),
    tokens: Tokens = "finite",
    **fields: Any,
) -> Array:
    """Value of one field at which ρ of the last layer passes a threshold, by bisection of its logarithm.

    Args:
        architecture: where to start from.
        name: a field or shorthand in which ρ is monotone: `attention_skip`, `residual_scale`, `qk_std`, …
        similarity: the threshold.
        between: where to look.
        tokens: as in `phases`.
        **fields: arrays in place of other fields; they broadcast.

    Returns:
        The value, to 1e-8 of its logarithm; NaN where ρ is on one side throughout.
    """
    shape = parameters_of(architecture, **fields).shape

    def above(log: Array) -> NDArray[np.bool_]:
        rho = final(architecture, tokens=tokens, **{**fields, name: np.exp(log)}).similarity
        return np.asarray(rho >= similarity)

    low, high = (np.full(shape or (1,), np.log(one)) for one in between)
    first, last = above(low), above(high)
    for _ in range(_STEPS):
        middle = (low + high) / 2
        same = above(middle) == first
        low, high = np.where(same, middle, low), np.where(same, high, middle)
    return np.asarray(np.where(first != last, np.exp((low + high) / 2), np.nan)).reshape(shape)


def critical_skip(
    architecture: Architecture, *, similarity: float = 0.99, tokens: Tokens = "limit", **fields: Any
) -> Array:
    r"""$\alpha_c(L)$: smallest strength of the skip past attention (`attention_skip`) with ρ_L below a threshold.

    It grows with depth, depends on the value gain and on the threshold. Source: arXiv 2505.24333.

    Args:
        architecture: where to start from.
        similarity: the threshold.
        tokens: as in `phases`; the paper's limit by default.
        **fields: arrays in place of fields, depth too.

    Returns:
        α_c, of the shape that the fields broadcast to; NaN where none between .001 and 1000 is critical.
    """
    return critical(architecture, "attention_skip", similarity=similarity, tokens=tokens, **fields)
