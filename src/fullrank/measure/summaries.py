"""One streaming pass per attention call, however many observers ask for it."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch import Tensor

from fullrank.capture.events import AttentionCall
from fullrank.measure.positions import eligible_rows, late_tokens, real_or_all
from fullrank.operators import Summary

__all__ = ["Summaries", "row_scopes"]


def row_scopes(call: AttentionCall) -> dict[str, Tensor]:
    """The query rows each scope averages over: name → (sequences, queries).

    `all` are the rows that see at least min(32, T/4) keys; a causal call adds `late`, those of them in the later half.

    Args:
        call: the attention call.

    Returns:
        The masks, `all` first; the last one is the headline.
    """
    batch, _, queries, keys = call.attention.shape
    visible = call.attention.visible_count()
    real_queries = real_or_all(call.real_queries, batch, queries, visible.device)
    real_keys = real_or_all(call.real_keys, batch, keys, visible.device)
    scopes = {"all": eligible_rows(visible, real_queries, real_keys)}
    if call.causal:
        scopes["late"] = scopes["all"] & late_tokens(real_queries)
    return scopes


class Summaries:
    """Remembers the scopes and the summary of the last call, and of no other.

    The call itself is not held: its queries, keys and values are the model's to free.
    """

    def __init__(self) -> None:
        self._call: Callable[[], AttentionCall | None] = lambda: None
        self._last: tuple[dict[str, Tensor], Summary] | None = None

    def __getstate__(self) -> dict[str, object]:
        return {}  # what travels to other processes is what was gathered, not the call that was seen last

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__init__()  # type: ignore[misc]

    def of(self, call: AttentionCall) -> tuple[dict[str, Tensor], Summary]:
        """The scopes of a call's rows and the summary with one column mean per scope, in the same order."""
        if self._last is None or self._call() is not call:
            scopes = row_scopes(call)
            self._last = scopes, call.attention.summary(groups=torch.stack(list(scopes.values())))
            self._call = weakref.ref(call)
        return self._last
