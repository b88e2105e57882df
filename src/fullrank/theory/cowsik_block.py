r"""What one block does to nearly equal tokens, and to gradients on their way back (cowsik, arXiv 2403.02579).

Derived here. Near ρ = 1 logits within a row agree, so attention is uniform: it writes the same into every token and
leaves what tells them apart alone. With q the mean square of the stream's entries, $b, s$ branch and skip, $v_A$ the
value gain, a wide MLP of $z = g_{up}q_r + \sigma_b^2$ (variance of a pre-activation, $q_r$ what the branch reads, 1
behind a norm), $v = g_{down}\mathbb E\varphi(\sqrt z\,\cdot)^2$ and $\chi = g_{down}g_{up}\mathbb E\varphi'(\sqrt z\,\cdot)^2$:

- size: $q_1 = s_A^2q + b_A^2v_Aq_r$, $q' = s_M^2q_1 + b_M^2v$;
- what tells tokens apart, $q - p$, and gradients that cancel over tokens, are multiplied by
  $s_A^2\,(s_M^2 + b_M^2\chi\,n_1)$, $n$ being the norm's slope, 1/q of what it reads;
- gradients that all tokens share by $(s_A^2 + b_A^2v_An)(s_M^2 + b_M^2\chi\,n_1)$.

A norm after a branch divides $v$ and χ by what it reads; one after the sum divides all factors by it. A norm's
projection, of one or two directions in d, is left out, as are the logits' gradients, which vanish at ρ = 1.
"""  # noqa: E501 - one definition in a line

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fullrank.theory.activations import overlap
from fullrank.theory.giorlandino_goldt_parameters import Parameters
from fullrank.theory.slopes import mean_square_slope

__all__ = ["Step", "step"]

Array = NDArray[np.float64]


class Step(NamedTuple):
    """One block at ρ = 1: q after it, and what squares of deviations and of gradients are multiplied by."""

    size: Array
    particular: Array
    common: Array


class _Branch(NamedTuple):
    """Mean square of what a branch writes, and its gain for small changes."""

    square: Array
    gain: Array


def step(one: Parameters, q: Array) -> Step:
    """Through one block.

    Args:
        one: the architecture's numbers.
        q: mean square of the stream before it.

    Returns:
        The mean square after it; the factor of deviations between tokens, which is that of gradients that cancel over
        tokens; the factor of gradients that all tokens share.
    """
    placement, with_mlp = one.architecture.placement, bool(one.architecture.mlp_width)
    (skip_a, skip_m), (b_a, b_m) = one.skip, one.branch
    attention = _attention(one, q)
    if one.architecture.parallel:
        mlp = _mlp(one, q) if with_mlp else _Branch(0 * q, 0 * q)
        total = skip_a * q + b_a * attention.square + b_m * mlp.square
        particular = skip_a + b_m * mlp.gain
        return _after(placement, Step(total, particular, particular + b_a * attention.gain))
    middle = _after(placement, Step(skip_a * q + b_a * attention.square, skip_a + 0 * q, skip_a + b_a * attention.gain))
    if not with_mlp:
        return middle
    mlp = _mlp(one, middle.size)
    factor = skip_m + b_m * mlp.gain
    last = _after(placement, Step(skip_m * middle.size + b_m * mlp.square, factor, factor))
    return Step(last.size, middle.particular * last.particular, middle.common * last.common)


def _after(placement: str, found: Step) -> Step:
    if placement != "post":
        return found
    return Step(np.ones_like(found.size), found.particular / found.size, found.common / found.size)


def _read(one: Parameters, q: Array) -> tuple[Array, Array]:
    """Mean square of what a branch reads, and the slope of the norm before it."""
    unit = np.asarray(1.0)
    if one.architecture.placement in ("pre", "peri"):
        return unit, 1 / q
    return (q.flat[0] + 0 * unit if np.ptp(q) == 0 else q), unit  # one number where they agree: moments are dear


def _normed(one: Parameters, branch: _Branch) -> _Branch:
    if one.architecture.placement not in ("peri", "res-post"):
        return branch
    some = np.asarray(branch.square > 0)  # a norm of nothing writes nothing
    gain = np.divide(branch.gain, branch.square, out=np.zeros(np.shape(branch.gain * branch.square)), where=some)
    return _Branch(some.astype(np.float64), gain)


def _attention(one: Parameters, q: Array) -> _Branch:
    read, slope = _read(one, q)
    return _normed(one, _Branch(one.value_gain * read + one.bias_attention, one.value_gain * slope))


def _mlp(one: Parameters, q: Array) -> _Branch:
    read, slope = _read(one, q)
    name, gated = one.architecture.activation, one.architecture.gated
    into = one.gate_gain if gated else one.up_gain
    z = into * read + one.bias_up
    square, moved = overlap(name, z, z, z), into * mean_square_slope(name, z)
    if gated:
        u = one.up_gain * read + one.bias_up
        square, moved = square * u, moved * u + square * one.up_gain
    return _normed(one, _Branch(one.down_gain * square + one.bias_mlp, one.down_gain * moved * slope))
