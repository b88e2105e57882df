r"""Token reduction (arXiv 2511.21477, ToMe, EViT): what a schedule of dropped and pooled tokens costs.

**Assumes** blocks of $4Nd^2 + 2N^2d$ multiply-accumulates for attention over $N$ tokens of width $d$ and
$2rNd^2$ for an MLP of $r d$ hidden units; tokens are reduced between the two, so that the MLP already sees fewer.
Norms, biases and the softmax are not counted.

**Symbols.** $N$ `tokens` (the class token included), $d$ `width`, $r$ `mlp_ratio`, `keep` the share of patch tokens
kept at a reduction, $w^2$ the pooled tokens that stand for the dropped ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fullrank.errors import TheoryError

__all__ = ["Reduction", "block_macs", "high_frequency_score", "pooled_mass", "schedule_macs", "tokens_after"]

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Reduction:
    """What one block drops, between its attention and its MLP.

    Attributes:
        block: from 1.
        keep: share of the patch tokens that stay, in (0, 1]; tokens pooled earlier are patches here.
        pooled: tokens that stand for those that were dropped, w².
    """

    block: int
    keep: float
    pooled: int = 0


def block_macs(
    tokens: ArrayLike, *, width: ArrayLike, after: ArrayLike | None = None, mlp_ratio: ArrayLike = 4.0
) -> Array:
    r"""Multiply-accumulates of one block, $4Nd^2 + 2N^2d + 2rN'd^2$.

    Args:
        tokens: N, that attention sees.
        width: d.
        after: N', that the MLP sees; by default N.
        mlp_ratio: r.

    Returns:
        How many, of the broadcast shape.
    """
    count, d = np.asarray(tokens, float), np.asarray(width, float)
    left = count if after is None else np.asarray(after, float)
    return np.asarray(4 * count * d**2 + 2 * count**2 * d + 2 * np.asarray(mlp_ratio, float) * left * d**2)


def tokens_after(tokens: int, reduction: Reduction, *, protected: int = 1) -> int:
    r"""$1 + \lfloor \text{keep}\,(N-1) \rfloor + w^2$ tokens.

    Args:
        tokens: N.
        reduction: what is dropped.
        protected: tokens that always stay, such as the class token.

    Returns:
        How many are left; never more than there were.
    """
    kept = protected + math.floor(reduction.keep * (tokens - protected) + 1e-9) + reduction.pooled
    return min(tokens, kept)


def schedule_macs(
    *,
    depth: int,
    width: int,
    tokens: int,
    reductions: Sequence[Reduction] = (),
    mlp_ratio: float = 4.0,
    patch_inputs: int = 0,
    classes: int = 0,
    protected: int = 1,
) -> tuple[float, tuple[int, ...]]:
    r"""Multiply-accumulates of a whole model under a schedule of reductions.

    Args:
        depth: blocks.
        width: d.
        tokens: N before the first block.
        reductions: at most one a block.
        mlp_ratio: r.
        patch_inputs: numbers in a patch (3·16·16), for the embedding of the N − protected patches; 0 leaves it out.
        classes: of the head, applied to one token; 0 leaves it out.
        protected: tokens that always stay.

    Returns:
        The count, and the tokens that each block's attention sees.

    Raises:
        TheoryError: for a block that is not there, two reductions at one, or a share outside (0, 1].
    """
    by_block = {one.block: one for one in reductions}
    if len(by_block) < len(reductions) or any(not 1 <= block <= depth for block in by_block):
        raise TheoryError(f"reductions= name blocks {[one.block for one in reductions]}: one each, from 1 to {depth}.")
    if any(not 0 < one.keep <= 1 or one.pooled < 0 for one in reductions):
        raise TheoryError("reductions= keep a share in (0, 1] of the tokens, and pool the rest into 0 or more.")
    total = float((tokens - protected) * patch_inputs * width + classes * width)
    seen, count = [], tokens
    for block in range(1, depth + 1):
        seen.append(count)
        left = tokens_after(count, by_block[block], protected=protected) if block in by_block else count
        total += float(block_macs(count, width=width, after=left, mlp_ratio=mlp_ratio))
        count = left
    return total, tuple(seen)


def high_frequency_score(attention: ArrayLike) -> Array:
    r"""$\tilde A_k = \tfrac1n \sum_q (A - J)_{qk}$: exactly the mean attention that a token receives, less 1/n.

    Args:
        attention: rows that add to 1, of shape (…, n, n); heads are averaged by whoever calls.

    Returns:
        Of shape (…, n), adding to 0.
    """
    maps = np.asarray(attention, float)
    return np.asarray(maps.mean(-2) - 1 / maps.shape[-1])


def pooled_mass(logits: ArrayLike, *, size_bias: bool = False) -> Array:
    r"""Softmax mass of one token with the mean key of a group, over the mass of the group itself.

    $e^{\bar s}/\sum_i e^{s_i} \le 1/m$ by Jensen: a pooled token is attended to less than what it stands for. With
    `size_bias`, $\log m$ is added to its logit, and the ratio is that of the geometric to the arithmetic mean.

    Args:
        logits: $s_i$ of the m tokens of the group, of shape (…, m); the query is linear in the key, so that the mean
            key has the mean logit.
        size_bias: whether log m is added.

    Returns:
        Ratio in (0, 1], of shape (…).
    """
    each = np.asarray(logits, float)
    bias = math.log(each.shape[-1]) if size_bias else 0.0
    return np.asarray(1 / np.exp(each - each.mean(-1, keepdims=True) - bias).sum(-1))
