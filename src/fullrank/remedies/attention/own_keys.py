"""Which key belongs to the token of each query: caches hold tokens before the queries, and may have empty places."""

from __future__ import annotations

import torch
from torch import Tensor

from fullrank.edit import Call
from fullrank.errors import EditError
from fullrank.remedies.attention.scores import seen_in
from fullrank.remedies.patient import Site

__all__ = ["LIMIT", "at_own_keys", "own_keys", "paired"]

LIMIT = (
    "Beside a key-value cache a query's own key is the last that it sees, as its mask says: of caches that grow, of "
    "fixed length or cut to a window. Where no mask tells it is refused; a model whose queries see later tokens beside "
    "a cache is not told apart, and is not to be run with one."
)
"""What is said of it."""


def paired(site: Site) -> bool:
    """Whether a module had a key for every query when it was looked at."""
    return all(call.queries == call.keys for call in site.calls)


def own_keys(call: Call, remedy: str, *, paired: bool) -> Tensor | None:
    """The number of each query's own key.

    With as many keys as queries, and where the kernel's flag says causal, it has the query's number. Beside a cache it
    is the last key that the query sees, as its mask says: right for caches that grow, of fixed length, or cut to a
    window, and for padding on either side. A single query without a mask sees all, and the last key is its own.

    Args:
        call: as it is made.
        remedy: for the sentence.
        paired: whether the module had a key for every query when it was repaired; others have keys of other tokens.

    Returns:
        (batch or 1, queries) numbers, of any key where a query sees none; None where query t has key t.

    Raises:
        EditError: where it cannot be told.
    """
    flagged = call.mask is None and call.logits is None and call.causal
    flagged = flagged and "flash" not in call.kernel  # there the flag counts from the last of both
    if call.queries == call.keys or (flagged and call.queries < call.keys):
        return None
    mask = call.logits if call.logits is not None else call.mask
    told = paired and call.queries < call.keys
    if told and call.queries == 1 and mask is None:
        return torch.full((1, 1), call.keys - 1, device=call.value.device)
    by_row = isinstance(mask, Tensor) and mask.shape[-2] == call.queries
    by_row = by_row and (call.queries == 1 or (mask is not None and mask.stride(-2) != 0))
    if told and by_row:
        seen = seen_in(call)
        assert seen is not None
        places = torch.arange(call.keys, device=seen.device)
        own: Tensor = (seen.any(1) * places).amax(-1)
        return own
    raise EditError(
        f"{remedy} needs to know which key is of a query's own token, and {call.place.path} has {call.queries} queries "
        f"for {call.keys} keys and no mask that tells; repair and run it without a cache."
    )


def at_own_keys(X: Tensor, queries: int, own: Tensor | None) -> Tensor:
    """What is at each query's own key.

    Args:
        X: (batch, heads, keys, width).
        queries: how many.
        own: as by `own_keys`.

    Returns:
        (batch, heads, queries, width).
    """
    if own is None:
        return X[..., :queries, :]
    index = own[:, None, :, None].expand(X.shape[0], X.shape[1], queries, X.shape[-1])
    return X.gather(-2, index)
