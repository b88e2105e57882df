"""A V and Aᵀ u without A: by blocks of rows."""

import torch
from jaxtyping import Float
from torch import Tensor

from fullrank.operators.scores import Scores, accumulate
from fullrank.operators.streaming import tiles

__all__ = ["apply", "apply_transposed", "probabilities"]


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


def apply(scores: Scores, V: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """A V."""
    batch, heads, queries, keys = scores.shape
    V4 = accumulate(V[None] if V.ndim == 3 else V).to(scores.dtype)
    repeat = heads // V4.shape[1]
    out = V4.new_empty(batch, heads, queries, V4.shape[3])
    for tile in tiles(scores.shape, group=scores.group, together=callable(scores.bias)):
        part = scores.select(tile.batch, tile.heads)
        v = V4[tile.batch, tile.heads.start // repeat : -(-tile.heads.stop // repeat)].repeat_interleave(repeat, 1)
        for rows in tile.rows:
            p = probabilities(part.block(rows, slice(0, keys)), part.sink)
            out[tile.batch, tile.heads, rows] = p @ v
    return out if V.ndim == 4 else out[0]


def apply_transposed(scores: Scores, U: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Aᵀ U."""
    batch, heads, _, keys = scores.shape
    U4 = accumulate(U[None] if U.ndim == 3 else U).to(scores.dtype)
    out = U4.new_zeros(batch, heads, keys, U4.shape[3])
    for tile in tiles(scores.shape, group=scores.group, together=callable(scores.bias)):
        part = scores.select(tile.batch, tile.heads)
        for rows in tile.rows:
            p = probabilities(part.block(rows, slice(0, keys)), part.sink)
            out[tile.batch, tile.heads] += p.mT @ U4[tile.batch, tile.heads, rows]
    return out if U.ndim == 4 else out[0]
