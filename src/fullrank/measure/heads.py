"""The heads of one call together, through the output projection: do they write the same, can they be told apart."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn

from fullrank import metrics
from fullrank.capture import Anatomy
from fullrank.capture.events import AttentionCall, Event, Signal
from fullrank.capture.weights import Weight, per_head, unreadable
from fullrank.measure.samples import Place, Samples
from fullrank.measure.summaries import Summaries
from fullrank.table import Row

__all__ = ["HeadObserver", "cosines_from_gram", "output_blocks", "output_weights"]

_NO_PAIR = "fewer than two heads write anything"
_NOT_DIRECT = "a gate or a norm lies between the kernel and W_O: what a head writes is more than A V W_O"
_NO_HEADS = "which columns of W_O read which head is not known"
_NO_VALUES = "the values handed to the kernel were not seen"


class HeadObserver:
    """`head_similarity`, each head's nearest, and, for the full readout, `head_ambiguity` of calls whose W_O is known.

    What the heads write is never formed: of Y_h = O_h W_O^h the inner products are those of O_hᵀO_g with W_O^h W_O^gᵀ.
    Cost of a call: one product with the map, T (H d_v)² a sequence and scope and (H d_v)² d for W_O W_Oᵀ; and one
    singular value decomposition of W_O for each layer.

    Args:
        model: the model that was surveyed.
        anatomy: what the survey found.
        summaries: shared with other observers of the same calls.
    """

    needs: frozenset[Signal] = frozenset({"attention"})

    def __init__(self, model: nn.Module, anatomy: Anatomy, summaries: Summaries | None = None) -> None:
        self._samples = Samples()
        self._summaries = summaries or Summaries()
        self._model = model
        self._outputs = output_weights(anatomy)
        self._lost: dict[Place, tuple[int, float]] = {}

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_model": None}  # numbers travel between processes, the model stays

    def see(self, event: Event) -> None:
        """Reduce one attention call to two numbers a sequence, and two a head."""
        if not isinstance(event, AttentionCall):
            return
        place = Place(event.stack, event.layer, "attention", event.part)
        weight = self._outputs.get((event.stack, event.layer, event.part))
        scopes = self._summaries.of(event)[0]
        sequences = event.attention.shape[0]
        reason, W_O = self._output(weight, event)
        if W_O is None or event.value is None:
            missing = torch.full((sequences,), torch.nan)
            for scope in scopes:
                self._samples.add(place, "head_similarity", missing, scope=scope, undefined=reason)
                of_heads = missing[:, None].expand(-1, event.attention.shape[1])
                self._add_nearest(place, of_heads, of_heads, scope, reason)
            self._samples.add(place, "head_ambiguity", missing, undefined=reason)
            return
        Z = event.attention.matmat(event.value)  # (sequences, heads, queries, d_v)
        flat = W_O.flatten(0, 1).double()
        K = flat @ flat.mT
        for scope, rows in scopes.items():
            cosines = torch.stack([_cosines(Z[s], rows[s], K) for s in range(sequences)])
            self._samples.add(place, "head_similarity", _mean(cosines), scope=scope, undefined=_NO_PAIR)
            nearest, which = cosines.nan_to_num(nan=-torch.inf).max(-1)
            nearest = nearest.nan_to_num(neginf=torch.nan)
            which = which.double().masked_fill(nearest.isnan(), torch.nan)
            self._add_nearest(place, nearest, which, scope, _NO_PAIR)
        if place not in self._lost:
            rank, condition_number = metrics.conditioning(W_O.flatten(0, 1))
            self._lost[place] = len(flat) - int(rank), float(condition_number)
        lost, condition = self._lost[place]
        tokens = torch.full((sequences,), Z.shape[2]) if event.real_queries is None else event.real_queries.sum(-1)
        note = f"for the full readout; condition number of W_O {condition:.3g}"
        self._samples.add(place, "head_ambiguity", lost * tokens.double(), note=note)

    def rows(self) -> list[Row]:
        """Every number gathered so far."""
        return self._samples.rows()

    def merge(self, other: Self) -> None:
        """Take in the sequences that another observer saw."""
        self._samples.merge(other._samples)

    def _add_nearest(self, place: Place, nearest: Tensor, which: Tensor, scope: str, undefined: str) -> None:
        self._samples.add(place, "nearest_head_similarity", nearest, scope=scope, undefined=undefined)
        self._samples.add(place, "nearest_head", which, scope=scope, undefined=undefined, reduce="mode")

    def _output(self, weight: Weight | None, call: AttentionCall) -> tuple[str, Tensor | None]:
        """W_O as (heads, d_v, width), or why it is not known."""
        if call.value is None:
            return _NO_VALUES, None
        heads, width = call.attention.shape[1], call.value.shape[-1]
        reason, W_O = output_blocks(self._model, weight, heads=heads, width=width)
        return reason, None if W_O is None else W_O.to(call.value.device)


def output_weights(anatomy: Anatomy) -> dict[tuple[str, int, str], Weight]:
    """W_O of every attention call, by stack, layer and part."""
    return {
        (stack.name, layer, weight.call): weight
        for stack in anatomy.stacks
        for layer, weights in enumerate(stack.weights, 1)
        for weight in weights
        if weight.role == "o" and weight.expert is None
    }


def output_blocks(model: nn.Module, weight: Weight | None, *, heads: int, width: int) -> tuple[str, Tensor | None]:
    """W_O as the matrices that read one head each.

    Args:
        model: the model that was surveyed.
        weight: of `output_weights`, or None.
        heads: of the call.
        width: of a head's output, d_v.

    Returns:
        Why it is not known, or empty; (heads, d_v, width of the stream), or None.
    """
    if weight is None:
        return "the output projection is not known", None
    reason = unreadable(model, weight)
    if reason or not weight.direct:
        return f"W_O: {reason}" if reason else _NOT_DIRECT, None
    blocks = per_head(model, weight)
    if len(blocks) != heads or any(block.shape[1] != width for block in blocks):
        return _NO_HEADS, None
    return "", torch.stack([block.mT for block in blocks])


def _cosines(Z: Tensor, rows: Tensor, K: Tensor) -> Tensor:
    heads = len(Z)
    Z = torch.where(rows[:, None], Z, 0)  # (heads, queries, d_v), of which the scope takes some queries
    Z = Z.transpose(0, 1).flatten(1).to(torch.promote_types(Z.dtype, torch.float32))
    return cosines_from_gram((Z.mT @ Z).double() * K, heads=heads)


def cosines_from_gram(products: Tensor, *, heads: int) -> Tensor:
    """Cosines between what heads write, from entrywise products of the Gram matrices of O and of W_O.

    Args:
        products: (H d_v, H d_v), (OᵀO) ∘ (W_O W_Oᵀ); its block (h, g) adds up to ⟨Y_h, Y_g⟩.
        heads: H.

    Returns:
        (H, H), at most 1; NaN on the diagonal and for heads that write nothing.
    """
    inner = products.reshape(heads, products.shape[0] // heads, heads, -1).sum((1, 3))
    norm = inner.diagonal().clamp(min=0).sqrt()
    writes = norm > 0
    cosines = inner / torch.where(writes, norm, 1) / torch.where(writes, norm, 1)[:, None]
    pairs = writes & writes[:, None] & ~torch.eye(heads, dtype=torch.bool, device=inner.device)
    return torch.where(pairs, cosines.clamp(-1, 1), torch.nan)


def _mean(cosines: Tensor) -> Tensor:
    return cosines.flatten(-2).nanmean(-1)
