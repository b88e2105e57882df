"""By what a model multiplies q·k, found by doubling what W_Q and W_K make: wherever in its code the factors stand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product as pairs
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from fullrank.capture import undisturbed
from fullrank.capture.lineage import Lineage
from fullrank.capture.places import place_of
from fullrank.capture.products import Product, product_of
from fullrank.capture.reference import reference_path
from fullrank.capture.tap import without_dispatch
from fullrank.capture.weights import Weight, indices
from fullrank.edit import Call, rewrite_attention
from fullrank.remedies.patient import Patient
from fullrank.remedies.weighing import head_rows

__all__ = ["Key", "score_scales"]

Key = tuple[str, int, str]
"""Stack, layer and part of an attention call."""

Pair = dict[str, Weight]
"""W_Q and W_K of one call, by `q` and `k`."""

_ROUNDING, _FLAT = 1e-3, 0.05


def score_scales(patient: Patient) -> dict[Key, float | None]:
    r"""The c in scores $c\,(W_Qx + b_Q)\cdot(W_Kx + b_K)$ + what does not depend on both, of every attention call.

    Models multiply by it in the kernel, in front of it, or not at all. Where a kernel shows queries and keys, what
    W_Q and W_K make is doubled and c = scale · |Δq|/|W_Q x + b_Q| · |Δk|/|W_K x + b_K|, which rotary embeddings leave
    as it is; where a model softmaxes by itself, c is the mixed difference of its scores under both doublings over the
    product, of each token with itself in self-attention. Calls hand on what they handed on without doubling, so that
    each layer is measured on what it reads.

    Args:
        patient: the model.

    Returns:
        By stack, layer and part; infinite where the size of W_Q changes no score, as in front of a norm of queries;
        None where what is shown is no multiple of what W_Q and W_K make, or is not seen. 1 to rounding is 1. Cost: two
        forwards, four where a model softmaxes by itself; the queries, keys and outputs of all layers are kept.
    """
    weights: dict[Key, Pair] = {}
    for stack, layer, weight in patient.weights("q", "k"):
        if not weight.reason:
            weights.setdefault((stack, layer, weight.call), {})[weight.role] = weight
    plain = _run(patient, weights, (), None)
    both = _run(patient, weights, ("q", "k"), plain)
    alone: list[list[_Heard]] = []
    if any(one.logits is not None for one in plain):
        alone = [_run(patient, weights, (role,), plain) for role in ("q", "k")]
    found: dict[Key, float | None] = {}
    for number, (before, after) in enumerate(zip(plain, both, strict=True)):
        if before.logits is None:
            c = _of_kernel(before, after)
        else:
            c = _of_scores(before, after, *(each[number] for each in alone))
        found[before.key] = c
    return found


@dataclass(eq=False)
class _Heard:
    """One attention call: what the kernel was given, and what W_Q and W_K had made, (tokens, features)."""

    key: Key
    weights: Pair
    scale: float = 1.0
    shown: dict[str, Tensor] = field(default_factory=dict)
    logits: Tensor | None = None
    visible: Tensor | None = None
    made: dict[str, Tensor] = field(default_factory=dict)
    output: Tensor | None = None


def _run(
    patient: Patient, weights: dict[Key, Pair], doubled: Sequence[str], plain: list[_Heard] | None
) -> list[_Heard]:
    """One forward in which what weights of some roles make is doubled; outputs are those of a forward before."""
    mode = _Doubling(patient, weights, doubled)
    heard: list[_Heard] = []
    ended = 0

    def before(call: Call) -> Call:
        key = (call.place.stack, call.place.layer, call.place.part)
        one = _Heard(key, weights.get(key, {}))
        if call.query is not None and call.key is not None:
            one.scale = call.query.shape[-1] ** -0.5 if call.scale is None else call.scale
            one.shown = {"q": call.query.detach().clone(), "k": call.key.detach().clone()}
        elif call.logits is not None:
            one.logits, one.visible = call.logits.detach().clone(), call.visible()
        if plain is None:
            one.made = {role: mode.made[_name(w)] for role, w in one.weights.items() if _name(w) in mode.made}
        heard.append(one)
        return call

    def after(call: Call, output: Tensor) -> Tensor:
        nonlocal ended
        ended += 1
        if plain is None:
            heard[ended - 1].output = output.detach().clone()
            return output
        kept = plain[ended - 1].output
        assert kept is not None
        return kept

    with (
        rewrite_attention(patient.model, patient.anatomy, before=before, after=after),
        undisturbed(patient.model),
        reference_path(patient.model, []),
        mode,
    ):
        patient.forward()
    return heard


def _name(weight: Weight) -> tuple[object, ...]:
    return weight.role, weight.parameter, weight.rows


class _Doubling(TorchFunctionMode):
    """Sees the products with W_Q and W_K; keeps what they make, and doubles that of some roles."""

    def __init__(self, patient: Patient, weights: dict[Key, Pair], doubled: Sequence[str]) -> None:
        super().__init__()
        self.made: dict[tuple[object, ...], Tensor] = {}
        self._lineage = Lineage(patient.model, lambda: None)
        self._doubled = doubled
        self._wanted: dict[str, dict[tuple[object, ...], Weight]] = {}
        for pair in weights.values():
            for weight in pair.values():
                self._wanted.setdefault(weight.parameter, {})[_name(weight)] = weight

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the function; a product with a weight that is meant is kept and doubled."""
        kwargs = kwargs or {}
        if func is functional.multi_head_attention_forward:
            with self:
                return without_dispatch(func)(*args, **kwargs)
        output = func(*args, **kwargs)
        place = len(self._lineage.nodes)
        self._lineage.see(func, getattr(func, "__name__", ""), args, kwargs, output)
        made = [node for node in self._lineage.nodes[place:] if node.function is func]
        product = product_of(made[0]) if made and made[0].stored and isinstance(output, Tensor) else None
        if product is not None and product.weight is not None:
            self._take(product, output)
        return output

    def _take(self, product: Product, output: Tensor) -> None:
        place = place_of(product)
        if place.reason or place.parameter not in self._wanted:
            return
        sizes = [output.shape[axis] for axis in product.features]
        rows = range(math.prod(sizes)) if place.rows is None else place.rows.tolist()
        at = {row: feature for feature, row in enumerate(rows)}
        rest = [axis for axis in range(output.ndim) if axis not in product.features]
        for name, weight in self._wanted[place.parameter].items():
            mine = list(at) if weight.rows is None else indices(weight.rows)
            if not all(row in at for row in mine):
                continue
            chosen = torch.tensor([at[row] for row in mine], device=output.device)
            features = output.permute(*rest, *product.features).reshape(-1, math.prod(sizes))
            self.made[name] = features[:, chosen]
            if weight.role in self._doubled:
                by = torch.ones(math.prod(sizes), device=output.device, dtype=output.dtype).index_fill(0, chosen, 2.0)
                shape = [output.shape[axis] if axis in product.features else 1 for axis in range(output.ndim)]
                output.mul_(by.view(sizes).permute(*_order(product.features)).reshape(shape))


def _order(axes: Sequence[int]) -> list[int]:
    return sorted(range(len(axes)), key=lambda one: axes[one])


# ---------------------------------------------------------------- from what was seen


def _of_kernel(before: _Heard, after: _Heard) -> float | None:
    c = before.scale
    for role in ("q", "k"):
        made, shown = before.made.get(role), before.shown[role].double()
        moved = after.shown[role].double() - shown
        if made is None:
            return None
        if made.any() and moved.norm() < _FLAT * shown.norm():
            if role == "q":
                return math.inf
            continue
        ratio = _length_ratio(moved, made.double(), before.weights[role], _tolerance(before.shown[role]))
        if ratio is None:
            return None
        c *= ratio
    return c


def _length_ratio(moved: Tensor, made: Tensor, weight: Weight, tolerance: float) -> float | None:
    """|Δ|/|y| over tokens, where it is the same for all; Δ (sequences, heads, tokens, width), y (tokens, features)."""
    heads = len({tuple(rows) for rows in head_rows(weight)})
    width = moved.shape[1] * moved.shape[3]
    repeated = moved.shape[1] / heads if heads else max(1.0, width / made.shape[1])
    longs, mades = moved.square().sum((1, 3)).flatten(), made.square().sum(-1)
    longs, mades = longs[longs > 0].sort().values, mades[mades > 0].sort().values * repeated
    if len(longs) != len(mades) or not len(longs):  # pooled, or seen several times
        return None
    square = longs.sum() / mades.sum()
    if float((longs / (mades * square) - 1).abs().max()) > tolerance:
        return None
    return _rounded(math.sqrt(float(square)))


def _of_scores(plain: _Heard, both: _Heard, q: _Heard, k: _Heard) -> float | None:
    if plain.logits is None or both.logits is None or q.logits is None or k.logits is None:
        return None
    if set(plain.made) != {"q", "k"}:
        return None
    S = plain.logits.double()
    mixed = both.logits.double() - q.logits.double() - k.logits.double() + S
    seen = torch.ones_like(S, dtype=torch.bool) if plain.visible is None else plain.visible.expand_as(S)
    heads = {role: head_rows(weight) for role, weight in plain.weights.items()}
    if any(len(each) != S.shape[1] for each in heads.values()):
        return None
    diagonal = not plain.key[2].startswith("cross") and S.shape[2] == S.shape[3]
    if diagonal:  # where rotary embeddings cancel
        S, mixed, seen = (one.diagonal(dim1=-2, dim2=-1) for one in (S, mixed, seen))
    mixed, size = torch.where(seen, mixed, 0.0), torch.where(seen, S, 0.0).norm()
    tolerance = _tolerance(plain.logits, plain.made["q"])
    for Q, K in pairs(*(_by_head(plain, role, heads[role]) for role in ("q", "k"))):
        if Q.shape[-1] != K.shape[-1] or (diagonal and Q.shape != K.shape):
            continue
        P = torch.where(seen, (Q * K).sum(-1) if diagonal else Q @ K.mT, 0.0)
        c = float((P * mixed).sum() / P.square().sum())
        if c > 0 and float((mixed - c * P).norm()) <= tolerance * float(mixed.norm()):
            return _rounded(c)
    return math.inf if float(mixed.norm()) < _FLAT * float(size) else None


def _by_head(heard: _Heard, role: str, heads: list[list[int]]) -> list[Tensor]:
    """(sequences, heads, tokens, width), with sequences first or tokens first in what the weight made."""
    assert heard.logits is not None
    made, sequences = heard.made[role].double(), heard.logits.shape[0]
    tokens = heard.logits.shape[2 if role == "q" else 3]
    if made.shape[0] != sequences * tokens or len({len(rows) for rows in heads}) != 1:
        return []
    split = made[:, torch.tensor(heads, device=made.device)]  # (all tokens, heads, width)
    first = split.view(sequences, tokens, *split.shape[1:]).transpose(1, 2)
    return [first, split.view(tokens, sequences, *split.shape[1:]).permute(1, 2, 0, 3)]


def _tolerance(*tensors: Tensor) -> float:
    return max(_ROUNDING, *(30 * torch.finfo(one.dtype).eps for one in tensors))


def _rounded(number: float) -> float:
    return 1.0 if abs(number - 1) < _ROUNDING else number
