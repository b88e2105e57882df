"""A V and Aᵀ u without A: by torch's fused attention where it can, else by blocks of rows."""

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from fullrank.errors import ShapeError
from fullrank.operators.blocks import ScoreBlocks, Tile, tiles
from fullrank.operators.masks import Shape
from fullrank.operators.scores import Scores
from fullrank.operators.separable import Separable

__all__ = ["apply", "apply_transposed", "columns_of", "probabilities"]

_CHUNKS = 4
"""V is sent through the fused kernel in at most so many pieces; recomputing the softmax by blocks is cheaper then."""


def probabilities(
    s: Float[Tensor, "batch heads q keys"], sink: Float[Tensor, " heads"] | None
) -> Float[Tensor, "batch heads q keys"]:
    """Softmax of a block of whole rows of scores; a row of −∞ becomes zeros, a sink joins the denominator."""
    m = s.amax(-1, keepdim=True)
    if sink is not None:
        sink = sink.to(s.dtype)[:, None, None]
        m = torch.maximum(m, sink)
    m = m.masked_fill(m == -torch.inf, 0)
    p = (s - m).exp_()
    Z = p.sum(-1, keepdim=True)
    if sink is not None:
        Z = Z + (sink - m).exp()
    return p.div_(Z.masked_fill(Z == 0, 1))


def columns_of(shape: Shape, X: Tensor, side: str, dtype: torch.dtype) -> Tensor:
    """X as (batch, heads or key-value heads, tokens, columns), in the precision of products.

    Args:
        shape: of the map.
        X: three dimensions for a single sequence, or four.
        side: `V` (over keys) or `U` (over queries).
        dtype: of the result.

    Returns:
        Four dimensions.

    Raises:
        ShapeError: where X does not fit the map.
    """
    tokens = shape[3] if side == "V" else shape[2]
    found = X[None] if X.ndim == 3 else X
    heads = found.shape[1] if found.ndim == 4 else 0
    if heads == 0 or found.shape[0] != shape[0] or found.shape[2] != tokens or shape[1] % heads:
        raise ShapeError(
            f"{side} has the shape {tuple(X.shape)}; expected ({shape[0]}, {shape[1]}, {tokens}, columns), or a number "
            "of heads that divides it."
        )
    return found.to(dtype)


@torch.no_grad()
def apply(scores: Scores, V: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """A V, for V of (batch, heads or key-value heads, keys, columns).

    Cost: as many fused attention forwards as V has widths of a head; by blocks about twice the one plus a product.

    Args:
        scores: what A is the softmax of.
        V: right vectors; three dimensions for a single sequence.

    Returns:
        (batch, heads, queries, columns), without the batch where V had none.
    """
    values = columns_of(scores.shape, V, "V", scores.dtype)
    out = values.new_zeros(*scores.shape[:3], values.shape[3])
    separable = Separable.of(scores)
    if separable is not None and values.shape[3] <= _CHUNKS * separable.width(values.shape[3]):
        separable.apply(values, out)
    else:
        for tile, rows, keys, p in _blocks(scores):
            v = _heads(values[tile.batch, :, keys], tile.heads, scores.shape[1])
            batch, heads = p.shape[:2]
            stacked = p.view(batch, v.shape[1], -1, p.shape[3])  # heads that share values below one another
            out[tile.batch, tile.heads, rows] = (stacked @ v).view(batch, heads, -1, v.shape[3])
    return out if V.ndim == 4 else out[0]


@torch.no_grad()
def apply_transposed(
    scores: Scores, U: Float[Tensor, "..."], *, known: tuple[Tensor, Tensor] | None = None
) -> Float[Tensor, "..."]:
    """Aᵀ U, for U of (batch, heads, queries, columns).

    Args:
        scores: what A is the softmax of.
        U: left vectors.
        known: log-sum-exp of every row and sum of every column of A, where a summary has been taken: then
            Aᵀu = c ⊙ softmax(kᵀq − lse) u, which the fused kernel computes, for c the column sums.

    Returns:
        (batch, heads, keys, columns).
    """
    left = columns_of(scores.shape, U, "U", scores.dtype)
    if left.shape[1] != scores.shape[1]:
        left = left.repeat_interleave(scores.shape[1] // left.shape[1], 1)
    out = left.new_zeros(*scores.shape[:2], scores.shape[3], left.shape[3])
    separable = Separable.of(scores) if known is not None else None
    fits = separable is not None and separable.square and left.shape[3] <= _CHUNKS * separable.width(left.shape[3])
    if known is not None and separable is not None and fits:
        separable.apply_transposed(left, out, *known)
        return out if U.ndim == 4 else out[0]
    for tile, rows, keys, p in _blocks(scores):
        out[tile.batch, tile.heads, keys] += p.mT @ left[tile.batch, tile.heads, rows]
    return out if U.ndim == 4 else out[0]


def _blocks(scores: Scores) -> Iterator[tuple[Tile, slice, slice, Tensor]]:
    """Every block of A that is not zero: its tile, rows and keys, and the weights."""
    together = callable(scores.bias)
    for tile in tiles(scores.shape, group=scores.group, together=together, mask=scores.mask):
        part = scores.select(tile.batch, tile.heads)
        blocks = ScoreBlocks(part)
        for rows, span in zip(tile.rows, part.mask.spans(tile.rows, part.shape), strict=True):
            if span.start < span.stop:
                yield tile, rows, slice(span.start, span.stop), blocks.weights(rows, span)
        del blocks  # before the next tile's keys and buffers are made


def _heads(values: Tensor, heads: slice, all_heads: int) -> Tensor:
    """The values that some heads read, each once where the heads of a group are all asked for."""
    group = all_heads // values.shape[1]
    start, stop = heads.start, heads.stop
    if (start % group == 0 and stop % group == 0) or start // group == (stop - 1) // group:
        return values[:, start // group : (stop - 1) // group + 1]
    index = torch.arange(start, stop, device=values.device) // group
    return values.index_select(1, index)
