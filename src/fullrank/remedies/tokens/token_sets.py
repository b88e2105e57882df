"""Fewer tokens made of many: kept and pooled by windows, merged into the most alike, or fused into one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["Standing", "fused", "merged", "pooled", "restored", "windows_of"]


@dataclass(frozen=True, eq=False)
class Standing:
    """What the tokens of now stand for.

    Attributes:
        sizes: (sequences, tokens) how many tokens of the image each stands for.
        cells: (sequences, tokens) the place in the grid of patches of each that is no protected or pooled token.
        source: (sequences, tokens at first) for every token of the image which one stands for it now.
        pooled: how many tokens at the end are pooled ones of `pooled`.
    """

    sizes: Tensor
    cells: Tensor
    source: Tensor
    pooled: int = 0

    @staticmethod
    def of(X: Tensor, protected: int) -> Standing:
        """Every token stands for itself."""
        count = torch.arange(X.shape[1], device=X.device).expand(X.shape[0], -1)
        exact = torch.promote_types(X.dtype, torch.float32)
        return Standing(torch.ones(count.shape, device=X.device, dtype=exact), count - protected, count)


def pooled(
    X: Tensor,
    standing: Standing,
    score: Tensor,
    *,
    protected: int,
    kept: int,
    windows: Tensor,
    old: Tensor,
    number: int,
    weighted: bool,
) -> tuple[Tensor, Standing]:
    """Keep the tokens of highest score and pool the rest, with the pooled tokens that there are, by windows.

    A window of which nothing was dropped has the mean of all patches in its place, of size 0.

    Args:
        X: (sequences, tokens, width): protected, patches, pooled tokens of before.
        standing: of these tokens.
        score: (sequences, tokens).
        protected: how many tokens come first and stay.
        kept: patches that stay.
        windows: (places) the window of each place of the grid.
        old: (pooled tokens of before) the window that takes each pooled token of before in.
        number: of windows.
        weighted: whether a pooled token of before counts as often as it has taken in; else once.

    Returns:
        Protected, kept in their order, and one pooled token per window; and what they stand for.
    """
    B, N, _ = X.shape
    end = N - standing.pooled
    top = score[:, protected:end].topk(kept, 1).indices.sort(1).values + protected
    stays = torch.zeros(B, N, dtype=torch.bool, device=X.device).scatter(1, top, True)
    stays[:, :protected] = True
    window = torch.cat([windows[standing.cells[:, :end].clamp(min=0)], old.expand(B, -1)], 1)
    members = functional.one_hot(window, number).mT & ~stays[:, None]  # (B, windows, N)
    sizes = members * standing.sizes[:, None]
    weights = sizes if weighted else (sizes > 0).to(sizes.dtype)
    some = weights.sum(-1, keepdim=True)
    patches = torch.ones_like(weights)
    patches[:, :, :protected] = 0
    weights = torch.where(some > 0, weights / some.clamp(min=1), patches / (N - protected))
    first = torch.arange(protected, device=X.device).expand(B, -1)
    index = torch.cat([first, top], 1)
    place = protected + kept + window
    place = place.scatter(1, index, torch.arange(index.shape[1], device=X.device).expand(B, -1))
    after = Standing(
        torch.cat([standing.sizes.gather(1, index), sizes.sum(-1)], 1),
        torch.cat([standing.cells.gather(1, index), index.new_zeros(B, number)], 1),
        place.gather(1, standing.source),
        number,
    )
    return torch.cat([_rows(X, index), _means(weights, X)], 1), after


def merged(X: Tensor, standing: Standing, metric: Tensor, *, protected: int, number: int) -> tuple[Tensor, Standing]:
    """Merge the tokens at even places that are most alike with one at an odd place into it, by size-weighted means.

    Args:
        X: (sequences, tokens, width).
        standing: of these tokens.
        metric: (sequences, tokens, width of keys), compared by cosine.
        protected: how many tokens come first and take no part.
        number: of tokens that are merged.

    Returns:
        Protected, what is left of even places in their order, odd places; and what they stand for.
    """
    B, N, _ = X.shape
    count = torch.arange(N, device=X.device)
    even, odd = count[protected + protected % 2 :: 2], count[protected + (protected + 1) % 2 :: 2]
    unit = functional.normalize(metric, dim=-1)
    best, to = (unit[:, even] @ unit[:, odd].mT).max(-1)
    order = best.argsort(1, descending=True)
    gone, stays = order[:, :number], order[:, number:].sort(1).values
    target = to.gather(1, gone)  # among the odd
    first = count[:protected].expand(B, -1)
    index = torch.cat([first, even[stays], odd.expand(B, -1)], 1)
    start = protected + stays.shape[1]  # where odd places begin now
    place = index.new_zeros(B, N).scatter(1, index, torch.arange(index.shape[1], device=X.device).expand(B, -1))
    place = place.scatter(1, even[gone], start + target)
    sizes = standing.sizes[..., None]
    flat = (target + torch.arange(B, device=X.device)[:, None] * len(odd)).flatten()
    mass = (X[:, odd] * sizes[:, odd]).flatten(0, 1)
    mass = mass.index_add(0, flat, (_rows(X, even[gone]) * _rows(sizes, even[gone])).flatten(0, 1))
    left = standing.sizes.gather(1, index).scatter_add(1, start + target, standing.sizes.gather(1, even[gone]))
    mean = (mass.view(B, len(odd), -1) / left[:, start:, None]).to(X.dtype)
    after = Standing(left, standing.cells.gather(1, index), place.gather(1, standing.source))
    return torch.cat([_rows(X, index[:, :start]), mean], 1), after


def fused(
    X: Tensor, standing: Standing, attention: Tensor, *, protected: int, kept: int, fusion: str
) -> tuple[Tensor, Standing]:
    """Keep the tokens that the class token attends to most, and make one of the others.

    Args:
        X: (sequences, tokens, width).
        standing: of these tokens.
        attention: (sequences, tokens) of the class token.
        protected: how many tokens come first and stay.
        kept: tokens that stay beside these.
        fusion: `raw`: their sum, each times the attention it has; `normalised`: the same over the sum of these;
            `none`: they are dropped, and the last token that is kept stands for them.

    Returns:
        Protected, kept in their order, the fused token; and what they stand for.
    """
    B, N, _ = X.shape
    top = attention[:, protected:].topk(kept, 1).indices.sort(1).values + protected
    first = torch.arange(protected, device=X.device).expand(B, -1)
    index = torch.cat([first, top], 1)
    goes = torch.ones(B, N, dtype=torch.bool, device=X.device).scatter(1, index, False)
    last = index.shape[1] - (fusion == "none")
    place = torch.full_like(standing.source[:, :1].expand(B, N), last)
    place = place.scatter(1, index, torch.arange(index.shape[1], device=X.device).expand(B, -1))
    new, sizes, cells = _rows(X, index), standing.sizes.gather(1, index), standing.cells.gather(1, index)
    if fusion != "none":
        weights = attention * goes
        if fusion == "normalised":
            weights = weights / weights.sum(1, keepdim=True)
        new = torch.cat([new, _means(weights[:, None], X)], 1)
        sizes = torch.cat([sizes, (standing.sizes * goes).sum(1, keepdim=True)], 1)
        cells = torch.cat([cells, index.new_zeros(B, 1)], 1)
    return new, Standing(sizes, cells, place.gather(1, standing.source))


def restored(X: Tensor, standing: Standing) -> Tensor:
    """Every token again, each with the state of what stands for it now: a plain mean of them weighs by size."""
    return _rows(X, standing.source)


def windows_of(rows: int, columns: int, number: int, device: torch.device) -> Tensor:
    """The window of each place of a grid, row by row: number × number windows, as even as they can be."""
    row = torch.arange(rows, device=device) * number // rows
    column = torch.arange(columns, device=device) * number // columns
    return (row[:, None] * number + column).flatten()


def _means(weights: Tensor, X: Tensor) -> Tensor:
    return (weights @ X.to(weights.dtype)).to(X.dtype)


def _rows(X: Tensor, index: Tensor) -> Tensor:
    """(sequences, chosen, width): rows, copied one by one, which is faster than by numbers."""
    start = torch.arange(X.shape[0], device=X.device)[:, None] * X.shape[1]
    return X.flatten(0, 1).index_select(0, (index + start).flatten()).view(*index.shape, X.shape[-1])
