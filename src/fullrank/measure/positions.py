"""Which tokens a number is taken over: real ones, late ones, rows that see enough keys."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["eligible_rows", "late_tokens", "real_or_all", "without_first"]

_FEWEST_KEYS = 32


def real_or_all(real: Tensor | None, sequences: int, tokens: int, device: torch.device) -> Tensor:
    """The mask of real tokens, (sequences, tokens); all of them where no mask was given."""
    if real is None:
        return torch.ones(sequences, tokens, dtype=torch.bool, device=device)
    return real.to(device=device, dtype=torch.bool)


def late_tokens(real: Tensor) -> Tensor:
    """Real tokens in the later half of their sequence, (sequences, tokens).

    Under a causal mask these are the queries that see more than half of the context; in packed rows and under windows
    they are the later half all the same. Positions count real tokens
    only, so that left and right padding give the same answer.

    Args:
        real: (sequences, tokens), which tokens are real.

    Returns:
        A mask of the same shape.
    """
    position = real.cumsum(-1)  # 1 for the first real token
    return real & (2 * position > real.sum(-1, keepdim=True))


def without_first(real: Tensor) -> Tensor:
    """Real tokens but for the first of each sequence, (sequences, tokens), however the batch is padded."""
    return real & (real.cumsum(-1) > 1)


def eligible_rows(visible: Tensor, real_queries: Tensor, real_keys: Tensor) -> Tensor:
    """Rows that enter means: real queries that see at least min(32, T/4) keys, (sequences, queries).

    T is the most that any query of the sequence sees: its real keys where attention is full or causal, the window or
    the longest document where it is cut. The first rows of a causal map see so few keys that their entropy or Σ A²
    says nothing about the head, and since their energy falls like 1/t they would set every mean.

    Args:
        visible: number of visible keys, (sequences | 1, heads | 1, queries).
        real_queries: (sequences, queries).
        real_keys: (sequences, keys); T is at most their number.

    Returns:
        A boolean mask.
    """
    seen = visible.amax(1)  # heads may see different keys; a row counts where any head sees enough
    context = torch.minimum(real_keys.sum(-1, keepdim=True), seen.amax(-1, keepdim=True))
    fewest = torch.minimum(torch.full_like(context, _FEWEST_KEYS), torch.ceil(context / 4).to(context.dtype))
    return real_queries & (seen >= fewest) & (seen > 0)
