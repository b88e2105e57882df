"""How many tokens a vision transformer has at each of its blocks under a way to reduce them, and what that costs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from fullrank.errors import RemedyError
from fullrank.theory.frequency_tokens import block_macs

__all__ = ["Method", "Reducing", "equal_cost", "quarters", "token_course", "token_macs"]

Method = Literal["frequency", "merge", "prune"]


@dataclass(frozen=True)
class Reducing:
    """What one block does between its attention and its MLP.

    Attributes:
        method: which tokens stay, and what becomes of the others.
        keep: share of the tokens beside the protected ones that stay, in (0, 1]; of `frequency` and `prune`.
        pooled: tokens that stand for those that are dropped: w² of `frequency`, 1 of `prune` with a fused token.
        merged: tokens that `merge` makes part of others, at most half.
    """

    method: Method
    keep: float = 1.0
    pooled: int = 0
    merged: int = 0

    def kept(self, tokens: int, protected: int, before: int = 0) -> int:
        """How many tokens stay as they are, beside the protected ones, of so many.

        `frequency` keeps ⌊keep·n⌋ of n, which counts the pooled tokens that there are; `prune` ⌈keep·n⌉; `merge`
        n − r, with r at most n/2.

        Args:
            tokens: that there are.
            protected: of these.
            before: of these, pooled tokens of an earlier block, which `frequency` takes into its own.

        Returns:
            The number; of `merge` also those that others are merged into.
        """
        n = tokens - protected
        if self.method == "merge":
            return n - min(self.merged, n // 2)
        if self.method == "prune":
            return math.ceil(self.keep * n - 1e-9)
        return min(math.floor(self.keep * n + 1e-9), n - before)

    def left(self, tokens: int, protected: int, before: int = 0) -> int:
        """How many tokens there are afterwards; where they would be no fewer, all stay."""
        return min(tokens, protected + self.kept(tokens, protected, before) + self.pooled)


def quarters(depth: int) -> tuple[int, ...]:
    """The blocks after each quarter of the depth: 4, 7 and 10 of 12."""
    return tuple(dict.fromkeys(1 + quarter * depth // 4 for quarter in (1, 2, 3)))


def token_course(
    tokens: int, steps: Mapping[int, Reducing], *, depth: int, protected: int = 1
) -> tuple[tuple[int, int], ...]:
    """Of each block how many tokens its attention and its MLP see.

    Args:
        tokens: before the first block.
        steps: by block, from 1.
        depth: blocks.
        protected: tokens that always stay.

    Returns:
        (attention, MLP) of each block.
    """
    course, before = [], 0
    for layer in range(1, depth + 1):
        left = steps[layer].left(tokens, protected, before) if layer in steps else tokens
        before = steps[layer].pooled if left < tokens else before
        course.append((tokens, left))
        tokens = left
    return tuple(course)


def token_macs(
    course: Sequence[tuple[int, int]],
    *,
    width: int,
    mlp_ratio: float = 4.0,
    patch_inputs: int = 0,
    classes: int = 0,
    protected: int = 1,
) -> float:
    r"""Multiply-accumulates of an image: $4Nd^2 + 2N^2d + 2rN'd^2$ a block, with the embedding and the head.

    What choosing the tokens costs, at most $N^2d$ at a block that reduces, is not in it.

    Args:
        course: (N, N') of each block, as `token_course` gives them.
        width: d.
        mlp_ratio: r; hidden units per d.
        patch_inputs: numbers in a patch; 0 leaves the embedding out.
        classes: of the head, which reads one token; 0 leaves it out.
        protected: tokens that are no patches.

    Returns:
        How many.
    """
    total = float((course[0][0] - protected) * patch_inputs * width + classes * width)
    return total + sum(float(block_macs(N, width=width, after=left, mlp_ratio=mlp_ratio)) for N, left in course)


def equal_cost(
    tokens: int,
    steps: Mapping[int, Reducing],
    layers: Sequence[int],
    *,
    depth: int,
    width: int,
    mlp_ratio: float = 4.0,
    protected: int = 1,
) -> int:
    """The fewest tokens merged in each of some blocks for no more multiply-accumulates than a schedule has.

    Args:
        tokens: before the first block.
        steps: the schedule to be met.
        layers: blocks that merge.
        depth: blocks.
        width: of the stream.
        mlp_ratio: hidden units of the MLP per width.
        protected: tokens that are never merged.

    Returns:
        r, at least 1.

    Raises:
        RemedyError: where merging in these blocks can never be as cheap.
    """
    wanted = token_macs(token_course(tokens, steps, depth=depth, protected=protected), width=width, mlp_ratio=mlp_ratio)
    for r in range(1, tokens // 2 + 1):
        merging = {layer: Reducing("merge", merged=r) for layer in layers}
        course = token_course(tokens, merging, depth=depth, protected=protected)
        if token_macs(course, width=width, mlp_ratio=mlp_ratio) <= wanted:
            return r
    places = ", ".join(map(str, layers))
    raise RemedyError(
        f"merging half of the tokens in blocks {places} costs more than this schedule: name more blocks, or give r=."
    )
