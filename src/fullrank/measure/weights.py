"""Numbers of the weights themselves, by role: no forward is needed beyond the one that found the roles."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from fullrank import metrics
from fullrank.capture import Anatomy
from fullrank.capture.weights import Role, Weight, matrix, per_head, unreadable
from fullrank.measure.samples import Place
from fullrank.table import Row

__all__ = ["weight_rows"]

SINGLE = ("weight_rms", "condensation", "spectral_norm", "weight_stable_rank", "weight_effective_rank")
_ROLES = ("q", "k", "v", "o")
_ZEROS = "the weight is zero, or has too few rows"
_OTHER_STREAM = "it reads another stream than the one it writes to: its eigenvalues mean nothing"
_LATENT = "queries, keys or values are not read from the stream itself but from what another weight made of it"
_NO_HEADS = "which rows belong to which head is not known"
_NOT_BACK = "its two weights do not lead from the stream back to it"

Numbers = dict[str, tuple[float, bool]]
"""Metric to value and whether it is exact."""


def weight_rows(
    model: nn.Module, anatomy: Anatomy, *, seed: int = 0, most_rows: int = 4096, widest: int = 512
) -> list[Row]:
    """Size, condensation and spectrum of every weight that has a role, and the circuits of every head.

    Parts are roles (`q`, `cross.q`, `up`, …; layer 0 for `embed`); experts of a mixture are one part (`expert.up`) with
    their mean, standard error and number. `qk_eigenvalue_variance` and `value_output_sign` have the part of the
    attention call (`self`), one row for each head; the latter without a head is that of all heads together. A weight
    that is the same tensor in several layers is measured once. Cost: O(out in min(out, in)) a weight, in float64 on the
    parameter's device, which for an embedding of V entries is V d².

    Args:
        model: the model that was surveyed; where it is sharded, every process calls this.
        anatomy: what the survey found.
        seed: for the rows that are drawn.
        most_rows: a weight with more rows than this is compared with itself on so many of them, drawn at random; then
            `condensation` is not exact.
        widest: heads that together are wider than this get no common `value_output_sign`, which is O(width³).

    Returns:
        The rows; what is not known says why.
    """
    seen: dict[Weight, Numbers] = {}
    rows: list[Row] = []
    for stack in anatomy.stacks:
        layers = [[stack.embed] if stack.embed else [], *map(list, stack.weights)]
        if stack.unembed is not None:
            layers[-1] = [*layers[-1], stack.unembed]
        for layer, weights in enumerate(layers):
            parts: dict[str, list[Weight]] = {}
            for weight in weights:
                parts.setdefault(weight.part, []).append(weight)
            for part, same in parts.items():
                place = Place(stack.name, layer, "weights", part)
                rows.extend(_single(model, place, same, seen, seed, most_rows))
            for call in dict.fromkeys(weight.call for weight in weights if weight.role in _ROLES):
                four = {weight.role: weight for weight in weights if weight.call == call}
                rows.extend(_circuits(model, Place(stack.name, layer, "weights", call), four, widest))
    return rows


def _single(
    model: nn.Module, place: Place, weights: Sequence[Weight], seen: dict[Weight, Numbers], seed: int, most_rows: int
) -> list[Row]:
    reason = next((why for weight in weights if (why := unreadable(model, weight))), "")
    if reason:
        return [Row(*place, metric, None, n=0, note=reason) for metric in SINGLE]
    found = []
    for weight in weights:
        key = _key(weight)
        if key not in seen:
            seen[key] = _numbers(matrix(model, weight), seed, most_rows)
        found.append(seen[key])
    others = list(dict.fromkeys(name for weight in weights for name in weight.beside))
    note = f"of {weights[0].parameter} alone; {', '.join(others)} add to it" if others else ""
    return [_pooled(place, metric, [numbers[metric] for numbers in found], note) for metric in SINGLE]


def _key(weight: Weight) -> Weight:
    """Equal for weights that are the same numbers, whatever role they play."""
    return Weight(
        "q",
        parameter=weight.parameter,
        rows=weight.rows,
        columns=weight.columns,
        out_axes=weight.out_axes,
        in_axes=weight.in_axes,
        expert=weight.expert,
    )


def _numbers(W: Tensor, seed: int, most_rows: int) -> Numbers:
    found = {name: (float(value), True) for name, value in metrics.weight_spectrum(metrics.singular_values(W)).items()}
    found["weight_rms"] = float(metrics.weight_rms(W)), True
    few = W.shape[0] <= most_rows
    if not few:
        drawn = torch.randperm(W.shape[0], generator=torch.Generator().manual_seed(seed))[:most_rows]
        W = W[drawn.sort().values.to(W.device)]
    found["condensation"] = float(metrics.condensation(W)), few
    return found


def _pooled(place: Place, metric: str, found: Sequence[tuple[float, bool]], note: str) -> Row:
    values = torch.tensor([value for value, _ in found], dtype=torch.float64)
    values = values[values.isfinite()]
    n = len(values)
    if not n:
        return Row(*place, metric, None, n=0, note=_ZEROS)
    stderr = float(values.std() / math.sqrt(n)) if n > 1 else None
    exact = all(exact for _, exact in found)
    return Row(*place, metric, float(values.mean()), stderr=stderr, n=n, exact=exact, note=note)


# ---------------------------------------------------------------- circuits


def _circuits(model: nn.Module, place: Place, four: Mapping[Role, Weight], widest: int) -> list[Row]:
    return [
        *_circuit(model, place, "qk_eigenvalue_variance", four, ("q", "k"), widest),
        *_circuit(model, place, "value_output_sign", four, ("v", "o"), widest),
    ]


def _circuit(
    model: nn.Module, place: Place, metric: str, four: Mapping[Role, Weight], pair: tuple[Role, Role], widest: int
) -> list[Row]:
    reason = _no_circuit(model, place, four, pair)
    if reason:
        return [Row(*place, metric, None, n=0, note=reason)]
    first, second = (per_head(model, four[role]) for role in pair)
    shape = first[0].shape if pair[1] == "k" else first[0].shape[::-1]
    if shape != second[0].shape:
        return [Row(*place, metric, None, n=0, note=_NOT_BACK)]
    function = getattr(metrics, metric)
    note = f"without {', '.join(others)}" if (others := [n for role in pair for n in four[role].beside]) else ""
    rows = []
    for head, (one, other) in enumerate(zip(first, second, strict=True)):
        value = float(function(one, other))
        empty = "" if math.isfinite(value) else "its eigenvalues are all zero"
        rows.append(Row(*place, metric, value, head=head, note=empty or note))
    if metric == "value_output_sign":
        rows.append(_together(place, metric, torch.cat(first), torch.cat(second, 1), widest, note))
    return rows


def _no_circuit(model: nn.Module, place: Place, four: Mapping[Role, Weight], pair: tuple[Role, Role]) -> str:
    if place.part.startswith("cross"):
        return _OTHER_STREAM
    if set(pair) - set(four):
        return "one of its weights is not known"
    for role in pair:
        reason = unreadable(model, four[role])
        if reason:
            return f"{role}: {reason}"
    if any(not four[role].direct for role in pair if role != "o"):
        return _LATENT
    counts = [len(four[role].heads) for role in pair]
    if not counts[0] or counts[0] != counts[1]:
        return _NO_HEADS
    return ""


def _together(place: Place, metric: str, W_V: Tensor, W_O: Tensor, widest: int, note: str) -> Row:
    if min(W_V.shape) > widest:
        why = f"all heads together are {min(W_V.shape)} wide: the eigenvalues of so wide a matrix take O(width³)"
        return Row(*place, metric, None, n=0, note=why)
    value = float(metrics.value_output_sign(W_V, W_O))
    return Row(*place, metric, value, note=note if math.isfinite(value) else "its eigenvalues are all zero")
