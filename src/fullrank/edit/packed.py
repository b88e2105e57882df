"""Who sees whom where a kernel is told it by lengths, by positions that start again or by flags, and not by a mask."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from fullrank.edit.call import Call
from fullrank.errors import EditError

__all__ = ["Documents", "PackedCall", "documents_of", "from_the_end"]


@dataclass(frozen=True, eq=False)
class Documents:
    """Which tokens of a row belong together.

    Attributes:
        of_queries: (queries,) number of the document and place counted from its end, (2, queries).
        of_keys: the same of keys, (2, keys).
        causal: whether in a document no query sees a later key, the last of both beside each other.
        window: how far from its own place a query sees at most; None for all.
        reason: why they cannot be told; empty where they can.
        real: which keys are no padding, broadcasts to (batch, 1, queries, keys); None for all.
    """

    of_queries: Tensor
    of_keys: Tensor
    causal: bool
    window: int | None
    reason: str = ""
    real: Tensor | None = None

    def mask(self) -> Tensor:
        """Who sees whom: bool, (batch or 1, 1, queries, keys)."""
        (document, at), (other, place) = self.of_queries, self.of_keys
        apart = at[:, None] - place
        seen: Tensor = document[:, None] == other
        if self.causal:
            seen = seen & (apart >= 0)
        if self.window is not None:
            seen = seen & (apart.abs() < self.window)
        return seen[None, None] if self.real is None else seen & self.real


class PackedCall(Call):
    """A call whose kernel is given no mask of who sees whom: it is made, in O(T²), where somebody asks for it."""

    @property
    def mask(self) -> Tensor | None:
        """Who sees whom.

        Raises:
            EditError: where it cannot be told.
        """
        given = self.__dict__["_given"]
        if not isinstance(given, Documents):
            return given  # type: ignore[no-any-return]
        reason = given.reason
        if not reason and (given.of_queries.shape[1], given.of_keys.shape[1]) != (self.queries, self.keys):
            reason = "an edit changed the number of its tokens, which its kernel counts"
        if reason:
            raise EditError(f"which keys are visible in {self.place.path} is not known: {reason}.")
        made = self.__dict__.get("_made")
        if made is None:
            made = self.__dict__["_made"] = given.mask()
        return made

    @mask.setter
    def mask(self, given: Any) -> None:
        self.__dict__["_given"] = given

    def change(self, **changes: Any) -> Self:
        """The same call with other tensors."""
        return dataclasses.replace(self, **{"mask": self.__dict__["_given"], **changes})

    def changed_mask(self, before: Call) -> bool:
        """Whether what is visible or added differs from that of another call."""
        same = self.__dict__["_given"] is before.__dict__.get("_given")
        return not same or self.bias is not before.bias or self.causal != before.causal


def documents_of(key: str, given: dict[str, Any], *, causal: bool, window: int | None) -> Documents | None:
    """The documents of a dispatched call without a mask.

    Args:
        key: of the kernel.
        given: what it is called with.
        causal: whether no later key is seen.
        window: how many keys are seen at most.

    Returns:
        None where the row is one document, or the kernel takes no notice.
    """
    if key in ("sdpa", "flex_attention"):
        return None
    query, keys = given["query"], given["key"].shape[2]
    batch, queries = query.shape[0], query.shape[2]
    ends = given.get("cu_seq_lens_q", given.get("cu_seq_lens"))
    if isinstance(ends, Tensor):
        others = given.get("cu_seq_lens_k")
        others = ends if others is None else others
        reason = "" if batch == 1 else "the lengths of its documents run over several rows"
        return Documents(_by_ends(ends, queries, query), _by_ends(others, keys, query), causal, window, reason)
    positions = given.get("position_ids") if "flash" in key else None
    if not isinstance(positions, Tensor) or batch != 1 or positions.shape != (1, queries) or queries == 1:
        return None
    starts = torch.ones_like(positions[0], dtype=torch.bool)
    starts[1:] = positions[0, 1:] != positions[0, :-1] + 1
    if not torch.compiler.is_compiling() and not bool(starts[1:].any()):  # the kernel asks this too
        return None
    document = starts.cumsum(0)
    told = torch.stack([document, torch.arange(queries, device=query.device)])
    reason = "" if keys == queries else "its row holds several documents, of which earlier ones are in a cache"
    return Documents(told, told, causal, window, reason)


def from_the_end(
    key: str, given: dict[str, Any], *, causal: bool, window: int | None, real: Tensor | None
) -> Documents | None:
    """One document whose causality and window a flash kernel counts from the last query and the last key.

    Args:
        key: of the kernel.
        given: what it is called with.
        causal: whether no later key is seen.
        window: how many keys are seen at most; on both sides where later ones are.
        real: which keys are no padding.

    Returns:
        None where counting from the first of both, and keys up to one's own alone, says the same.
    """
    query, keys = given["query"], given["key"].shape[2]
    queries = query.shape[2]
    window = None if window is None or keys <= window else window  # the kernels' interface leaves it out then
    if "flash" not in key or not (causal or window) or (queries == keys and (causal or not window)):
        return None
    rows, columns = (torch.arange(-number, 0, device=query.device) for number in (queries, keys))
    of_queries, of_keys = (torch.stack([torch.zeros_like(at), at]) for at in (rows, columns))
    return Documents(of_queries, of_keys, causal, window, real=real)


def _by_ends(ends: Tensor, tokens: int, like: Tensor) -> Tensor:
    ends = ends.to(like.device).long()
    at = torch.arange(tokens, device=like.device)
    document = torch.bucketize(at, ends[1:], right=True)
    return torch.stack([document, at - ends[(document + 1).clamp(max=len(ends) - 1)]])
