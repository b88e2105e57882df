"""The null of a map: the visible entries of every row in random order, each row with its own permutation.

Row statistics (entropy, Σ A²) stay as they are, structure between rows goes. Short maps get uniformly random
permutations. Sorting is too dear for long ones; there row t gets the affine permutation i ↦ (a_t i + b_t) mod n_t of
its n_t visible keys, a_t coprime to n_t. Rows stay independent, and every entry's position is uniform and nearly
independent of any other entry's (exactly so for prime n_t), so that second moments, which set the edge of the spectrum,
are those of a random permutation.
"""

from collections.abc import Callable

import torch
from jaxtyping import Int
from torch import Tensor

from fullrank.operators.kept import Kept, Slab
from fullrank.operators.masks import Mask, Shape
from fullrank.operators.randomness import own_generator

__all__ = ["affine_sources", "permuted", "sorted_sources"]

_SORTED = 1 << 18
"""Maps of up to this many entries get uniformly random permutations."""

_CANDIDATES = 32
"""Tries at a multiplier that is coprime to n; all fail for one row in ten thousand at worst, which then keeps a = 1."""


def permuted(kept: Kept, mask: Mask, *, seed: int) -> Kept | None:
    """The null of a kept map. O(B H T S); the permutations are shared by heads, and differ between rows.

    Args:
        kept: the map.
        mask: who is visible.
        seed: of its own generator.

    Returns:
        A map of the same slabs; None for a long map whose visible keys are not one interval per query.
    """
    generator = own_generator(seed)
    if kept.shape[2] * kept.shape[3] <= _SORTED:
        source = sorted_sources(mask, kept.shape, generator).to(kept.device)
        return _gathered(kept, lambda slab: source[:, :, slab.queries, slab.keys] - slab.keys.start)
    if not mask.plain or mask.keys(kept.shape) is not None:
        return None
    first, stop = mask.intervals(kept.shape, "cpu")
    factor, shift = _affine(stop - first, generator)
    parts = [x.to(kept.device) for x in (first, stop, factor, shift)]

    def source_of(slab: Slab) -> Tensor:
        a, b, c, d = (x[:, slab.queries] for x in parts)
        source: Tensor = affine_sources(a, b, c, d, slab.keys)[:, None] - slab.keys.start
        return source

    return _gathered(kept, source_of)


def _gathered(kept: Kept, source_of: Callable[[Slab], Tensor]) -> Kept:
    slabs = [
        slab._replace(weights=slab.weights.gather(-1, source_of(slab).expand(slab.weights.shape)))
        for slab in kept.slabs
    ]
    return Kept(kept.shape, tuple(slabs), kept.dtype, kept.device)


def sorted_sources(mask: Mask, shape: Shape, generator: torch.Generator) -> Int[Tensor, "#batch #heads queries keys"]:
    """Where each entry of the permuted map comes from: a uniformly random permutation of the visible keys of each row.

    Args:
        mask: who is visible.
        shape: (batch, heads, queries, keys).
        generator: of the permutations.

    Returns:
        Key indices; a hidden key is its own source.
    """
    block = mask.block(slice(0, shape[2]), slice(0, shape[3]), shape, device="cpu")
    visible = torch.ones(1, 1, *shape[2:], dtype=torch.bool) if block is None else block
    visible = visible.expand(*visible.shape[:2], *shape[2:])
    draw = torch.rand(visible.shape, generator=generator)
    place = torch.arange(shape[3]).expand(visible.shape)
    shuffled = torch.where(visible, draw, place + 2).argsort(-1)  # hidden keys last, in order
    ordered = torch.where(visible, place, place + shape[3]).argsort(-1)
    return torch.empty_like(place, memory_format=torch.contiguous_format).scatter_(-1, ordered, shuffled)


def affine_sources(
    first: Int[Tensor, "batch q"],
    stop: Int[Tensor, "batch q"],
    factor: Int[Tensor, "batch q"],
    shift: Int[Tensor, "batch q"],
    keys: slice,
) -> Int[Tensor, "batch q k"]:
    """Where each entry comes from under i ↦ (factor · i + shift) mod n on the interval of n = stop − first keys.

    Args:
        first: first visible key of each query.
        stop: one past the last.
        factor: coprime to n.
        shift: any.
        keys: the range asked for.

    Returns:
        Key indices; a hidden key is its own source.
    """
    first, stop, factor, shift = (x[..., None] for x in (first, stop, factor, shift))
    s = torch.arange(keys.start, keys.stop, device=first.device)
    inside = (s >= first) & (s < stop)
    moved = first + ((s - first) * factor + shift) % (stop - first).clamp(min=1)
    return torch.where(inside, moved, s)


def _affine(n: Int[Tensor, "batch q"], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A multiplier coprime to n and a shift, for every row."""
    count = n.clamp(min=1)
    draw = torch.rand((_CANDIDATES, *n.shape), generator=generator, dtype=torch.float64)
    candidates = (draw * count).long().clamp(min=1)
    coprime = torch.gcd(candidates, count.expand_as(candidates)) == 1
    chosen = candidates.gather(0, coprime.int().argmax(0, keepdim=True))[0]
    factor = torch.where(coprime.any(0), chosen, 1)
    shift = (torch.rand(n.shape, generator=generator, dtype=torch.float64) * count).long()
    return factor, shift
