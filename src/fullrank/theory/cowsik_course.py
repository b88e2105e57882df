r"""Nearly equal tokens, and gradients, through the blocks of an architecture (cowsik, arXiv 2403.02579).

A block multiplies squares of what tells tokens apart by P and sends C − P of them through attention's average J, on the
way forward as on the way back (`cowsik_block`). Where every token sees all, $JJ^\top$ is one direction of T, and the
products of P and of C are all there is. Under a causal mask a block's factor is the polynomial $P + (C-P)\mathcal J$,
$\mathcal J^k$ being worth the share of `cesaro`; its coefficients are kept, as many as there are blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fullrank.theory.cesaro import causal_shares
from fullrank.theory.cowsik_block import step
from fullrank.theory.giorlandino_goldt_map import UNBOUNDED
from fullrank.theory.giorlandino_goldt_parameters import Parameters

__all__ = ["State", "course"]

Array = NDArray[np.float64]


@dataclass(frozen=True)
class State:
    """After some blocks.

    Attributes:
        size: q, mean square of the stream's entries, held at 1e60.
        growth: logarithm of the mean square over that before the first block, not held.
        particular: logarithm of the product of P, for deviations between tokens.
        common: of the product of C.
        powers: under a causal mask, coefficients of the polynomial over `scale`, (depth + 1, …); else None.
        scale: logarithm of what they are divided by.
    """

    size: Array
    growth: Array
    particular: Array
    common: Array
    powers: Array | None
    scale: Array

    def apart(self, one: Parameters, *, late: bool = False) -> Array:
        """Logarithm of what the mean square deviation between tokens was multiplied by; of `late` ones, if asked."""
        if self.powers is None:
            return self.particular
        return self._of(one, "deviations_late" if late else "deviations")

    def gradient(self, one: Parameters, *, late: bool = False) -> Array:
        """Logarithm of what comes back of squares of gradients that are independent between tokens."""
        if self.powers is None:
            share = 1 / one.context
            return np.asarray(np.logaddexp(self.particular + np.log1p(-share), self.common + np.log(share)))
        return self._of(one, "gradients_late" if late else "gradients")

    def _of(self, one: Parameters, name: str) -> Array:
        assert self.powers is not None
        contexts = np.unique(one.context)
        orders = len(self.powers) - 1
        known = np.stack([getattr(causal_shares(int(T), orders), name) for T in contexts], -1)
        worth = known[:, np.searchsorted(contexts, one.context)]
        with np.errstate(divide="ignore"):
            return np.asarray(np.log((self.powers * worth).sum(0)) + self.scale)


def course(one: Parameters) -> Iterator[State]:
    """The state before the first block and after every block; what is shallower than others stays as it is.

    Args:
        one: the architecture's numbers.

    Yields:
        depth + 1 states.
    """
    zero = np.zeros(one.shape)
    deepest = int(one.depth.max())
    powers = None
    if one.architecture.mask == "causal":
        powers = np.zeros((deepest + 1, *one.shape))
        powers[0] = 1
    state = State(np.broadcast_to(one.input_square, one.shape) + zero, zero, zero, zero, powers, zero)
    yield state
    for number in range(1, deepest + 1):
        state = _next(one, state, number <= one.depth)
        yield state


def _next(one: Parameters, state: State, here: NDArray[np.bool_]) -> State:
    made = step(one, state.size)
    powers, scale = state.powers, state.scale
    with np.errstate(divide="ignore", invalid="ignore"):
        particular = state.particular + np.where(here, np.log(made.particular), 0.0)
        common = state.common + np.where(here, np.log(made.common), 0.0)
        if powers is not None:
            grown = powers * made.particular
            grown[1:] += powers[:-1] * (made.common - made.particular)
            largest = grown.max(0)
            powers, scale = np.where(here, grown / largest, powers), scale + np.where(here, np.log(largest), 0.0)
        growth = state.growth + np.where(here, np.log(made.size) - np.log(state.size), 0.0)
    size = np.where(here, np.minimum(made.size, UNBOUNDED), state.size)
    return State(size, growth, particular, common, powers, scale)
