"""How large gradients are on their way back: of the stream by layer, of queries, keys, values and output by head."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple, Self

import torch
from torch import Tensor

from fullrank import metrics
from fullrank.capture.events import Backward, Event, GradientState, Signal, StreamState
from fullrank.measure.positions import late_tokens, real_or_all
from fullrank.measure.probed import Estimate, Squares, estimate
from fullrank.measure.samples import Place
from fullrank.table import Row

__all__ = ["GradientObserver"]

_NOTHING = "no gradient reaches the last state"
_NO_TOKEN = "no real token in the scope"
_ONE = "the tokens are one, or their similarity is at the float floor"


class _Key(NamedTuple):
    place: Place
    scope: str


class GradientObserver:
    """Gradients of every state and of the tensors of every attention call, with their ratios over depth.

    Of the model's own loss, or of random projections of the last states (`exact=False` then); per sequence over its
    real tokens, and over the late ones where attention is causal. `gradient_gain` and `gradient_exponent` compare with
    the last state of the stack; `angle_exponent` is of the states of the same forward.

    Args:
        causal: names of stacks whose self-attention is causal.
    """

    needs: frozenset[Signal] = frozenset({"stream", "gradient"})

    def __init__(self, *, causal: Collection[str] = ()) -> None:
        self._causal = frozenset(causal)
        self._squares: dict[_Key, Squares] = {}
        self._entries: dict[_Key, Squares] = {}
        self._missing: dict[Place, str] = {}
        self._similarity: dict[str, dict[int, list[Tensor]]] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        self._exact = True

    def see(self, event: Event) -> None:
        """Reduce one gradient, or one state, to its numbers."""
        if isinstance(event, Backward):
            self._exact &= event.of == "loss"
        elif isinstance(event, StreamState) and (event.site, event.part) == ("stream", "out"):
            real = real_or_all(event.real, event.value.shape[0], event.value.shape[1], event.value.device)
            layers = self._similarity.setdefault(event.stack, {})
            layers.setdefault(event.layer, []).append(metrics.similarity(event.value, real))
            self._dtypes[event.stack] = event.value.dtype
        elif isinstance(event, GradientState):
            self._see_gradient(event)

    def rows(self) -> list[Row]:
        """Every number gathered so far."""
        depths = {stack: max(layers) for stack, layers in self._similarity.items()}
        rows = [row for key in self._squares for row in self._size_rows(key)]
        for key in [key for key in self._squares if key.place.part in ("out", "mid")]:
            rows.extend(self._gain_rows(key, depths))
        for place, reason in self._missing.items():
            if not any(key.place == place for key in self._squares):
                names = ("gradient_rms", "gradient_gain") if place.part in ("out", "mid") else ("gradient_rms",)
                rows.extend(Row(*place, name, None, n=0, exact=self._exact, note=reason) for name in names)
        return [*rows, *self._exponent_rows(depths)]

    def merge(self, other: Self) -> None:
        """Take in the sequences that another observer saw."""
        for mine, theirs in ((self._squares, other._squares), (self._entries, other._entries)):
            for key, squares in theirs.items():
                mine.setdefault(key, Squares()).merge(squares)
        self._missing |= other._missing
        self._dtypes |= other._dtypes
        self._exact &= other._exact
        for stack, layers in other._similarity.items():
            for layer, values in layers.items():
                self._similarity.setdefault(stack, {}).setdefault(layer, []).extend(values)

    # ------------------------------------------------------------ one gradient

    def _see_gradient(self, event: GradientState) -> None:
        of_state = event.which == "state"
        part = event.part if of_state else f"{event.part}.{event.which}"
        place = Place(event.stack, event.layer, "gradient", part)
        if event.value is None:
            self._missing.setdefault(place, event.reason)
            return
        G = event.value
        real = real_or_all(event.real, G.shape[0], G.shape[-2], G.device)
        scopes = {"all": real}
        if event.stack in self._causal and not event.part.startswith("cross"):
            scopes["late"] = late_tokens(real)
        for scope, mask in scopes.items():
            key = _Key(place, scope)
            entries = mask.sum(-1) * G.shape[-1]
            rms = metrics.gradient_rms(G, mask if of_state else mask.unsqueeze(1).expand(G.shape[:-1])).double()
            count = entries if of_state else entries.unsqueeze(-1)
            self._squares.setdefault(key, Squares()).add(rms.square() * count, event.backward)
            self._entries.setdefault(key, Squares()).add(count.expand(rms.shape), event.backward)

    # ------------------------------------------------------------ rows

    def _size_rows(self, key: _Key) -> list[Row]:
        squares, entries = self._squares[key].stacked(), self._entries[key].stacked()
        found = estimate(lambda S, n: (S / n).sqrt(), squares, entries)
        headless = squares[0].ndim == 2
        return [
            self._row(key, "gradient_rms", one, _NO_TOKEN, head=None if headless else head)
            for head, one in enumerate(found)
        ]

    def _gain_rows(self, key: _Key, depths: dict[str, int]) -> list[Row]:
        depth = depths.get(key.place.stack, 0)
        last = self._squares.get(_Key(key.place._replace(layer=depth, part="out"), key.scope))
        if last is None or not _alike(self._squares[key], last):
            return [self._row(key, "gradient_gain", Estimate(None, None, 0), _NOTHING)]
        squares = self._squares[key].stacked(), last.stacked()
        gain = estimate(lambda S, S_L: (S / S_L).sqrt(), *squares)[0]
        rows = [self._row(key, "gradient_gain", gain, _NOTHING)]
        if key.place.layer == 0 and key.place.part == "out" and depth > 0:
            exponent = estimate(lambda S, S_L: metrics.gradient_exponent((S / S_L).sqrt(), layers=depth), *squares)[0]
            whole = _Key(key.place._replace(layer=depth), key.scope)
            rows.append(self._row(whole, "gradient_exponent", exponent, _NOTHING))
        return rows

    def _exponent_rows(self, depths: dict[str, int]) -> list[Row]:
        rows = []
        for stack, layers in self._similarity.items():
            depth = depths[stack]
            if depth == 0 or 0 not in layers:
                continue
            ends = [[torch.cat([one.cpu() for one in layers[layer]])[None]] for layer in (0, depth)]
            if ends[0][0].shape != ends[1][0].shape:
                continue
            dtype = self._dtypes[stack]

            def exponent(rho_0: Tensor, rho_L: Tensor, depth: int = depth, dtype: torch.dtype = dtype) -> Tensor:
                return metrics.angle_exponent(rho_0, rho_L, layers=depth, dtype=dtype)

            key = _Key(Place(stack, depth, "gradient", "out"), "all")
            note = "the mean rate over the stack; the exponent of the theory is at nearly equal tokens"
            found = estimate(exponent, *ends)[0]
            rows.append(self._row(key, "angle_exponent", found, _ONE, exact=True, note=note))
        return rows

    def _row(
        self,
        key: _Key,
        metric: str,
        found: Estimate,
        undefined: str,
        *,
        head: int | None = None,
        exact: bool | None = None,
        note: str = "",
    ) -> Row:
        return Row(
            *key.place,
            metric,
            found.value,
            head=head,
            scope=key.scope,
            stderr=found.stderr,
            n=found.n,
            exact=self._exact if exact is None else exact,
            note=undefined if found.value is None else note,
        )


def _alike(one: Squares, other: Squares) -> bool:
    return [[S.shape for S in batch] for batch in one.batches] == [[S.shape for S in batch] for batch in other.batches]
