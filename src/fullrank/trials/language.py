"""A small language whose entropy is known: every symbol follows from the one before it or from the one before that.

A mixture of two transitions (Raftery, 1985): y is π(b) with probability w₁, σ(a) with w₂, else any of the K symbols,
where b is the last symbol, a the one before, and π and σ are permutations. All symbols are equally frequent, so that
who knows nothing of the context loses log K; who reads the last symbol only loses less, and who reads both least. A
network whose tokens have become alike stays at the first, one that hands every token through reaches the second, and
the third needs attention that tells one token from its neighbour.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

__all__ = ["Language", "Levels"]


@dataclass(frozen=True)
class Levels:
    """Expected losses per symbol, in nats.

    Attributes:
        chance: of who knows nothing of the context: log K.
        own: of who knows the last symbol.
        both: of who knows the last two; nothing is lower.
    """

    chance: float
    own: float
    both: float


@dataclass(frozen=True)
class Language:
    """Transitions between K symbols.

    Attributes:
        symbols: K.
        last: w₁, how often the last symbol decides.
        before: w₂, how often the one before it does.
        seed: of the permutations.
    """

    symbols: int
    last: float = 0.3
    before: float = 0.6
    seed: int = 0

    @cached_property
    def permutations(self) -> tuple[Tensor, Tensor]:
        """π and σ."""
        draw = torch.Generator().manual_seed(self.seed)
        return torch.randperm(self.symbols, generator=draw), torch.randperm(self.symbols, generator=draw)

    def answers(self, before: Tensor, last: Tensor, draw: torch.Generator) -> Tensor:
        """What follows a pair of symbols.

        Args:
            before: a, any shape.
            last: b, of the same shape.
            draw: where chance is from.

        Returns:
            y, of the same shape.
        """
        pi, sigma = self.permutations
        u = torch.rand(last.shape, generator=draw)
        noise = torch.randint(self.symbols, last.shape, generator=draw)
        return torch.where(u < self.last, pi[last], torch.where(u < self.last + self.before, sigma[before], noise))

    def text(self, sequences: int, length: int, draw: torch.Generator) -> Tensor:
        """Text in which every symbol is the answer to the two before it, (sequences, length)."""
        drawn = [torch.randint(self.symbols, (sequences,), generator=draw) for _ in range(2)]
        while len(drawn) < length:
            drawn.append(self.answers(drawn[-2], drawn[-1], draw))
        return torch.stack(drawn[:length], 1)

    def riddles(self, sequences: int, length: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
        """Symbols drawn one by one, and at every place the answer to it and the one before: two (sequences, length).

        For networks that see the whole sequence at once; the first place answers to itself and the last one.

        Returns:
            The symbols and the answers.
        """
        x = torch.randint(self.symbols, (sequences, length), generator=draw)
        return x, self.answers(x.roll(1, 1), x, draw)

    @cached_property
    def of_text(self) -> Levels:
        """What is lost on text, after it has run long enough for pairs to be as frequent as they will be."""
        K = self.symbols
        pairs = torch.full((K, K), 1 / K**2, dtype=torch.float64)  # P(a, b)
        for _ in range(64):
            pairs = torch.einsum("ab,abc->bc", pairs, self._transitions)
        return self._levels(pairs)

    @cached_property
    def of_riddles(self) -> Levels:
        """What is lost on riddles, whose pairs are all equally frequent."""
        return self._levels(torch.full((self.symbols, self.symbols), self.symbols**-2.0, dtype=torch.float64))

    @cached_property
    def _transitions(self) -> Tensor:
        """P(y | a, b), (K, K, K)."""
        pi, sigma = self.permutations
        one = torch.eye(self.symbols, dtype=torch.float64)
        rest = (1 - self.last - self.before) / self.symbols
        return self.before * one[sigma][:, None, :] + self.last * one[pi][None, :, :] + rest

    def _levels(self, pairs: Tensor) -> Levels:
        joint = pairs[..., None] * self._transitions  # P(a, b, y)
        last = joint.sum(0)
        return Levels(
            chance=math.log(self.symbols),
            own=_conditional(last, last.sum(-1, keepdim=True)),
            both=_conditional(joint, pairs[..., None]),
        )


def _conditional(joint: Tensor, given: Tensor) -> float:
    """H(y | given) = −Σ P log (P / P(given))."""
    return -float(torch.special.xlogy(joint, joint / given.clamp(min=1e-300)).sum())
