"""One pass over the score matrix by blocks of query rows: everything a summary holds, in bounded memory."""

import torch
from jaxtyping import Bool
from torch import Tensor

from fullrank.operators.blocks import ScoreBlocks, tiles
from fullrank.operators.masks import Span
from fullrank.operators.scores import Scores
from fullrank.operators.summary import Summary

__all__ = ["summarise", "tiles"]

_ROWS = ("log_sum_exp", "entropy", "inverse_participation", "max_logit", "logit_mean", "logit_std", "row_sum")


@torch.no_grad()
def summarise(scores: Scores, groups: Bool[Tensor, "groups batch queries"] | None = None) -> Summary:
    """The summary of softmax(scores), in one pass.

    Per block of rows: m = max_s s, Z = Σ exp(s − m), log-sum-exp m + log Z, entropy Σ p (m − s) + log Z, and
    Σ A² = Σ exp(2(s − m)) / Z². Cost: one product of queries and keys and some ten passes over each block; memory: a
    few blocks of 4 MiB and the result.

    Args:
        scores: what is softmaxed.
        groups: groups of rows whose mean row is wanted; by default one, of all rows that see a key.

    Returns:
        The summary.
    """
    batch, heads, queries, keys = scores.shape
    device = scores.device
    visible = scores.mask.visible_count(scores.shape, device).expand(batch, heads, queries)
    member = torch.ones(1, batch, queries, dtype=torch.bool, device=device) if groups is None else groups.to(device)
    weight = member[:, :, None] & (visible > 0)  # (groups, batch, heads, queries)
    out = {name: torch.empty(batch, heads, queries, dtype=torch.float64, device=device) for name in _ROWS}
    columns = torch.zeros(len(member), batch, heads, keys, dtype=torch.float64, device=device)
    together = callable(scores.bias)
    for tile in tiles(scores.shape, group=scores.group, together=together, mask=scores.mask):
        at = (tile.batch, tile.heads)
        part = scores.select(*at)
        blocks = ScoreBlocks(part, centred=True)
        for rows, span in zip(tile.rows, part.mask.spans(tile.rows, part.shape), strict=True):
            if span.start == span.stop:
                continue  # no query of the block sees a key: all of it becomes NaN
            found, mass = _block(blocks, rows, span, visible[*at, rows], weight[:, *at, rows])
            columns[:, *at, span.start : span.stop] += mass
            for name, value in found.items():
                out[name][*at, rows] = value
        del blocks  # before the next tile's keys and buffers are made
    hidden = visible == 0
    rows_of = {name: tensor.masked_fill_(hidden, torch.nan) for name, tensor in out.items()}
    columns /= weight.sum(-1)[..., None]  # 0/0 for a group without rows
    return Summary(**rows_of, visible=visible, column_mean=columns)


def _block(blocks: ScoreBlocks, rows: slice, span: Span, n: Tensor, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Statistics of the rows of one block, and what it adds to the columns' mass."""
    s, shift = blocks.raw(rows, span)
    edges = blocks.edges(rows, span)
    mean, std = _moments(s, span, edges, n, blocks.buffer(1, tuple(s.shape)))
    for edge, hidden in edges:
        s[..., edge].masked_fill_(hidden, -torch.inf)
    m, top = blocks.shift_by_maximum(s)
    largest = _largest(blocks, s, top if shift is None else top.double() + shift, rows, span)
    blocks.clamp(s, edges)
    p = torch.exp(s, out=blocks.buffer(1, tuple(s.shape)))
    for edge, hidden in edges:
        p[..., edge].masked_fill_(hidden, 0)
    rest = Z = p.sum(-1).double()
    sink = blocks.sink()
    if sink is not None:
        Z = Z + (sink - m).double().exp()
    Y = torch.linalg.vector_norm(p, dim=-1).double() ** 2
    share = torch.where(weight, 1 / Z, 0).movedim(0, 2).to(p.dtype)  # (batch, heads, groups, rows)
    mass = (share @ p).movedim(2, 0)
    E = s.mul_(p).sum(-1).double()
    row_sum = rest / Z
    shifted = m.double() if shift is None else m.double() + shift
    return {
        "log_sum_exp": shifted + Z.log(),
        "entropy": (row_sum * Z.log() - E / Z).clamp(min=0),
        "inverse_participation": Y / Z**2,
        "max_logit": largest,
        "logit_mean": mean if shift is None else mean + shift,
        "logit_std": std,
        "row_sum": row_sum,
    }, mass


def _largest(blocks: ScoreBlocks, s: Tensor, top: Tensor, rows: slice, span: Span) -> Tensor:
    """The row maxima, taken again in float64 where float32 does not resolve them; `s` are the shifted scores."""
    # a maximum near 0 may be the small sum of large terms, and so may its rivals: the first few are looked at
    scores = blocks.scores
    top = top.double()
    if s.dtype == torch.float64:
        return top
    if s.device.type == "cpu":
        error = 1e-7 * blocks.query_norm(rows) * blocks.key_norm
        b, h, t = ((top.abs() < 1e4 * error) & (error > 1e-7)).nonzero(as_tuple=True)
        if not len(b):
            return top
    else:  # asking whether there are any would make the device wait
        b, h, t = (
            x.flatten() for x in torch.meshgrid(*(torch.arange(n, device=s.device) for n in top.shape), indexing="ij")
        )
    near, key = s[b, h, t].topk(min(4, s.shape[3]), dim=-1)
    q = scores.query[:, :, rows][b, h, t].double() * scores.factor
    k = scores.key[b[:, None], h[:, None] // scores.group, span.start + key].double()
    exact = (k @ q[:, :, None])[..., 0]
    if scores.softcap is not None:
        exact = scores.softcap * (exact / scores.softcap).tanh()
    bias = scores.bias_block(rows, slice(span.start, span.stop))
    if bias is not None:
        exact = exact + bias.expand(s.shape)[b[:, None], h[:, None], t[:, None], key]
    top[b, h, t] = exact.masked_fill(near == -torch.inf, -torch.inf).amax(-1)
    return top


def _moments(
    s: Tensor, span: Span, edges: list[tuple[slice, Tensor]], n: Tensor, deviation: Tensor
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the visible scores, in two looks: squares of deviations do not cancel."""
    if edges:
        clear = s[..., span.clear_start - span.start : span.clear_stop - span.start]
        seen = [s[..., edge].masked_fill(hidden, 0) for edge, hidden in edges]
        total = sum((part.sum(-1).double() for part in seen), clear.sum(-1).double())
    else:
        total = s.sum(-1).double()
    mean = total / n
    torch.sub(s, mean[..., None].to(s.dtype), out=deviation)
    for edge, hidden in edges:
        deviation[..., edge].masked_fill_(hidden, 0)
    return mean, torch.linalg.vector_norm(deviation, dim=-1).double() / n.sqrt()
