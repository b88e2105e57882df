r"""One block of the (q, p) map at finitely many tokens (giorlandino_goldt, arXiv 2505.24333: Result 1, Algorithm 1).

$q_i$ is the mean square of the entries of a token at position class i, $p_{ij}$ the mean product of the entries of two
tokens of classes i and j (`giorlandino_goldt_positions`): arrays (classes, …) and (pairs, …).

- Attention, of unit gain: $q' = \bar p + (\bar q - \bar p)Y_2$, $p' = \bar p_{ij} + (\bar q - \bar p)O$, bars being
  means over the keys that are seen, $Y_2(s, n)$ and the overlap O of two rows (`random_energy`) at a standard deviation
  of logits $s = s_1\sqrt{q(\bar q - \bar p)}$. As $T \to \infty$ it is the paper's: $O = 0$,
  $Y_2 = \max(0, 1 - \beta_c/\beta)$.
  Keys that one query likes also agree along its direction: $s^2(1-Y_2)^3/d$ comes to $Y_2$, and r times as much to O,
  for rows whose logits correlate by r (of Poisson–Dirichlet weights; exact for small s).
  Under rotary positions equal keys differ, $q(\bar q - \kappa\bar p)$ (`giorlandino_goldt_rotary`).
- Centred (gain control): without $\bar p$, and with $Y_2 - 1/n$, $O - 1/n$.
- MLP: Gaussian moments of the activation (`activations`).
- Residual: $q \leftarrow s^2q + b^2q'$, alike for p. Norm: $p_{ij} \leftarrow p_{ij}/\sqrt{q_iq_j}$, $q \leftarrow 1$.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fullrank.theory import random_energy
from fullrank.theory.activations import overlap
from fullrank.theory.giorlandino_goldt_parameters import Parameters
from fullrank.theory.giorlandino_goldt_positions import Positions, positions_of
from fullrank.theory.giorlandino_goldt_rotary import rotary_agreement

__all__ = ["UNBOUNDED", "Attended", "BlockMap", "Overlaps", "Tokens"]

Array = NDArray[np.float64]
Tokens = Literal["finite", "limit"]

UNBOUNDED: Final = 1e60
"""Mean square at which the stream is held: no number that a model computes with reaches it."""

_TINY: Final = 1e-150  # whose square is no zero yet


class Overlaps(NamedTuple):
    """Mean squares q (classes, …) and mean products p (pairs, …) of entries of tokens."""

    q: Array
    p: Array


class Attended(NamedTuple):
    """Of attention, by class of positions (classes, …): logit standard deviation, keys seen, Y₂."""

    logit_std: Array
    keys: Array
    participation: Array


@dataclass(frozen=True)
class BlockMap:
    """The map of one block.

    Attributes:
        parameters: of the architecture.
        tokens: `finite`, or the paper's `limit` of infinitely many at fixed gauge.
        positions: classes of positions.
        agreement: κ of rotary positions, by class (classes, …); None for others.
        centred: whether attention is centred (gain control): (A − U)V, U averaging over the keys that a query sees.
    """

    parameters: Parameters
    tokens: Tokens
    positions: Positions
    agreement: Array | None = None
    centred: bool = False

    @classmethod
    def of(cls, parameters: Parameters, tokens: Tokens = "finite", *, centred: bool = False) -> BlockMap:
        """With the classes of positions that the mask and the tokens call for."""
        causal = parameters.architecture.mask == "causal" and tokens == "finite"
        window = parameters.window
        if window is not None and (window >= parameters.context).all():
            window = None  # it cuts nothing off
        positions = positions_of(causal=causal, context=parameters.context, window=window)
        rotary = parameters.architecture.positions == "rotary" and tokens == "finite"
        return cls(parameters, tokens, positions, rotary_agreement(1 / positions.inverse) if rotary else None, centred)

    def start(self) -> Overlaps:
        """Before the first block: every pair at the correlation ρ₀."""
        classes, pairs = len(self.positions.share), len(self.positions.first)
        one = self.parameters
        q, p = one.input_square, one.input_square * one.correlation
        return Overlaps(np.broadcast_to(q, (classes, *q.shape)), np.broadcast_to(p, (pairs, *p.shape)))

    def block(self, state: Overlaps) -> tuple[Overlaps, Overlaps, Attended]:
        """State after attention, after the MLP, and what attention did. A parallel block has no state between."""
        one = self.parameters
        read = self.read(state)
        branch, attended = self.attention(read)
        middle = self._add(state, branch, 0)
        if not one.architecture.mlp_width:
            return middle, middle, attended
        if one.architecture.parallel:
            middle = self._joined(state, branch, self.mlp(read))
            return middle, middle, attended
        return middle, self._add(middle, self.mlp(self.read(middle)), 1), attended

    def attention(self, read: Overlaps) -> tuple[Overlaps, Attended]:
        """What attention writes, of the state that it reads."""
        one, at = self.parameters, self.positions
        q_bar = np.tensordot(at.prefix, read.q, 1)
        p_bar = np.tensordot(at.average, read.p, 1)
        spread = np.maximum(q_bar - p_bar[at.diagonal], 0.0)
        apart = spread if self.agreement is None else np.maximum(q_bar - self.agreement * p_bar[at.diagonal], 0.0)
        own, other = (
            (np.ones_like(read.q), apart / np.maximum(q_bar, _TINY)) if one.architecture.qk_norm else (read.q, apart)
        )
        s = self._capped(one.logit_std * np.sqrt(own * other))
        Y2, both = self._weights(s, read)
        tilt = self._tilt(s, Y2)
        q = p_bar[at.diagonal] + spread * (Y2 + tilt)
        p = p_bar + spread[at.first] * (both + self._queries(read) * np.sqrt(tilt[at.first] * tilt[at.second]))
        gain, bias = one.value_gain, one.bias_attention
        if self.centred:  # what all keys have in common goes, a bias of the values with it
            inverse, inverse_pair = (0.0, 0.0) if self.tokens == "limit" else (at.inverse, at.inverse_pair)
            bias, q = np.asarray(0.0), q - p_bar[at.diagonal] - spread * inverse
            p = p - p_bar - spread[at.first] * inverse_pair
        keys = 1 / at.inverse + 0 * s
        return Overlaps(gain * q + bias, gain * p + bias), Attended(s, keys, Y2)

    def mlp(self, read: Overlaps) -> Overlaps:
        """What the MLP writes, of the state that it reads."""
        one, at = self.parameters, self.positions
        name = one.architecture.activation
        gain = one.gate_gain if one.architecture.gated else one.up_gain
        q, p = gain * read.q + one.bias_up, gain * read.p + one.bias_up
        square, product = overlap(name, q, q, q), overlap(name, q[at.first], q[at.second], p)
        if one.architecture.gated:
            square = square * (one.up_gain * read.q + one.bias_up)
            product = product * (one.up_gain * read.p + one.bias_up)
        return Overlaps(one.down_gain * square + one.bias_mlp, one.down_gain * product + one.bias_mlp)

    # ------------------------------------------------------------ parts

    def _weights(self, s: Array, read: Overlaps) -> tuple[Array, Array | float]:
        at, one = self.positions, self.parameters
        if self.tokens == "limit":
            return random_energy.inverse_participation_limit(s / np.sqrt(np.log(one.context))), 0.0
        Y2 = random_energy.inverse_participation(s, 1 / at.inverse)
        i, j = at.first, at.second
        r = self._queries(read)
        gain = np.sqrt(Y2[i] / at.inverse[i] * Y2[j] / at.inverse[j])  # n Y₂, 1 where attention is uniform
        both = random_energy.row_overlap(gain * at.inverse_pair, r, 1 / at.inverse_pair, head_width=one.head_width)
        return Y2, both

    def _queries(self, read: Overlaps) -> Array:
        """Cosine of two queries of a head, (pairs, …)."""
        at = self.positions
        cosine = np.asarray(read.p / np.maximum(np.sqrt(read.q[at.first] * read.q[at.second]), _TINY))
        return cosine if self.agreement is None else cosine * self.agreement[at.second]

    def _tilt(self, s: Array, Y2: Array) -> Array:
        """Mean of attended tokens along the query's direction: one of d, so it vanishes as width grows."""
        if self.tokens == "limit":
            return 0 * s
        return np.square(s) * (1 - Y2) ** 3 / self.parameters.width

    def _capped(self, s: Array) -> Array:
        cap = self.parameters.architecture.softcap
        if cap is None:
            return s
        z = np.linspace(-6, 6, 61)
        weight = np.exp(-z * z / 2) / np.exp(-z * z / 2).sum()
        return np.asarray(cap * np.sqrt(sum(w * np.tanh(s * x / cap) ** 2 for w, x in zip(weight, z, strict=True))))

    def read(self, state: Overlaps) -> Overlaps:
        """What a branch is given of the stream."""
        if self.parameters.architecture.placement in ("pre", "peri"):
            return self._normed(state)
        return state

    def _normed(self, state: Overlaps) -> Overlaps:
        at = self.positions
        size = np.sqrt(np.maximum(state.q, _TINY))
        return Overlaps(
            np.ones((len(at.share), *(1,) * (state.q.ndim - 1))), state.p / (size[at.first] * size[at.second])
        )

    def _add(self, state: Overlaps, branch: Overlaps, which: int) -> Overlaps:
        one = self.parameters
        if one.architecture.placement in ("peri", "res-post"):
            branch = self._normed(branch)
        skip, scale = one.skip[which], one.branch[which]
        return self._total(Overlaps(skip * state.q + scale * branch.q, skip * state.p + scale * branch.p))

    def _joined(self, state: Overlaps, attention: Overlaps, mlp: Overlaps) -> Overlaps:
        one = self.parameters
        if one.architecture.placement in ("peri", "res-post"):
            attention, mlp = self._normed(attention), self._normed(mlp)
        (skip, _), (a, m) = one.skip, one.branch
        q = skip * state.q + a * attention.q + m * mlp.q
        return self._total(Overlaps(q, skip * state.p + a * attention.p + m * mlp.p))

    def _total(self, state: Overlaps) -> Overlaps:
        if self.parameters.architecture.placement == "post":
            return self._normed(state)
        held = np.minimum(1.0, UNBOUNDED / np.maximum(state.q.max(0), 1.0))  # far beyond any float32, yet no overflow
        return Overlaps(state.q * held, state.p * held)
