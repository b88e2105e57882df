"""QK-clip: the weights of queries and keys shrunk where the scores of a head exceed a bound."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fullrank.capture import undisturbed
from fullrank.capture.weights import Weight, indices
from fullrank.edit import Call, Edit, replace_weight, rewrite_attention, together
from fullrank.edit.handle import make
from fullrank.edit.places import module_at
from fullrank.errors import RemedyError
from fullrank.remedies.attention.scores import row_blocks, scores, seen_in
from fullrank.remedies.parameter import Parameter
from fullrank.remedies.patient import Patient, Site
from fullrank.remedies.remedy import remedy

__all__ = ["largest_scores", "qk_clip"]

_CLOSE = 1.02  # weights in half precision come no nearer


@remedy(
    "qk-clip",
    "weights of queries and keys shrunk where the scores of a head exceed a bound",
    addresses=("entropy-collapse", "numerics"),
    acts_on="weights",
    exactness="changes-function",
    formula="W_q^h, W_k^h ← √γ_h·(…), γ_h = min(1, τ/S^h_max), S^h_max the largest visible score of the head on the "
    "batch",
    papers=("Kimi K2 (the clip of MuonClip); not read here",),
    keys=("oversmoothing_fixes",),
    parameters=(Parameter("threshold", "τ, the largest score that is left", 100.0, above=0.0),),
    limits=(
        "Where no score of the batch exceeds τ it changes nothing.",
        "It acts once, on the weights as they are; Kimi K2 clips after every step.",
        "A key head that several query heads share takes √γ of the head that needs it least, and each query head the "
        "rest.",
        "Layers are clipped one after the other, each on what those before it then make; scores on other inputs may "
        "be larger.",
        "Where norms stand between the weights and the scores, as with QK-norm, scores do not follow and it is "
        "refused.",
    ),
    cost="one forward for each layer that is clipped; no parameters",
    structural=False,
)
def qk_clip(patient: Patient, *, threshold: float = 100.0) -> Edit:
    """Clip every self-attention, first layers first."""
    edits: list[Edit] = []
    rounds: dict[str, int] = {}
    try:
        while True:
            found = largest_scores(patient)
            over = [site for site in patient.self_attention if bool((found[site.path] > threshold * _CLOSE).any())]
            if not over:
                break
            site = over[0]
            rounds[site.path] = rounds.get(site.path, 0) + 1
            if rounds[site.path] > (1 if len(site.calls) == 1 else 4):
                raise RemedyError(
                    f"the scores of {site.path} do not follow its weights: a norm stands between them; use temperature."
                )
            largest = found[site.path]
            edits.extend(_clipped(patient, site, torch.where(largest > threshold, threshold / largest, 1.0)))
    except BaseException:
        for edit in reversed(edits):
            edit.undo()
        raise
    if not edits:
        top = max(float(one.max()) for one in found.values())
        return make("clip queries and keys", [f"no head: the largest score is {top:.3g}"], [])
    edit = together(edits)
    edit.what = "clip queries and keys"
    return edit


def largest_scores(patient: Patient) -> dict[str, Tensor]:
    """The largest visible score of each head on the batch, without biases, for each attention module; in float64."""
    look = _Largest()
    with rewrite_attention(patient.model, patient.anatomy, before=look), undisturbed(patient.model), torch.no_grad():
        patient.forward()
    return look.found


class _Largest:
    def __init__(self) -> None:
        self.found: dict[str, Tensor] = {}

    def __call__(self, call: Call) -> Call:
        bare = call
        if call.query is not None:
            biased = call.mask is not None and call.mask.dtype != torch.bool
            seen = seen_in(call.change(causal=False, window=None)) if biased else call.mask
            bare = call.change(bias=None, mask=seen)
        largest = torch.stack([scores(bare, rows)[0].amax((0, 2, 3)) for rows in row_blocks(call)]).amax(0).double()
        before = self.found.get(call.place.path)
        self.found[call.place.path] = largest if before is None else torch.maximum(before, largest)
        return call


def _clipped(patient: Patient, site: Site, gamma: Tensor) -> list[Edit]:
    """γ of each query head on the products of its queries and keys: on weights, and on what is added after them."""
    place = site.first.place
    weights = {
        role: _weight(patient, role, place.stack, place.layer, place.part, site.path) for role in ("q", "k", "v")
    }
    q, k = weights["q"], weights["k"]
    groups: dict[tuple[tuple[int, int, int], ...], list[int]] = {}
    for head, rows in enumerate(k.heads):
        groups.setdefault(rows, []).append(head)
    factors: dict[str, Tensor] = {}
    taken: dict[int, Tensor] = {}
    for rows, heads in groups.items():
        of_key = gamma[heads].max().sqrt()
        _multiply(patient, factors, k, rows, of_key)
        taken |= dict.fromkeys(heads, of_key)
    for head, rows in enumerate(q.heads):
        _multiply(patient, factors, q, rows, gamma[head] / taken[head])
    _refuse_shared(weights, site.path)
    edits: list[Edit] = []
    for name, factor in factors.items():
        weight = q if q.parameter == name else k
        edits.append(replace_weight(patient.model, name, lambda P, w=weight, f=factor: _scaled(P, w, f)))  # type: ignore[misc]
        bias = _added_after(patient, name, len(factor))
        if bias is not None:
            edits.append(replace_weight(patient.model, bias, lambda b, f=factor: b * f.to(b)))  # type: ignore[misc]
    return edits


def _weight(patient: Patient, role: str, stack: str, layer: int, part: str, path: str) -> Weight:
    found = [
        one for s, n, one in patient.weights(role, part=part) if (s, n) == (stack, layer) and (role == "v" or one.heads)
    ]
    one = found[0] if len(found) == 1 else None
    if role != "v" and (one is None or one.reason or one.beside):
        told = one.reason if one is not None and one.reason else "no single weight makes each head of them"
        raise RemedyError(f"the weights {role!r} of {path} cannot be clipped: {told}.")
    return one if one is not None else Weight("v")


def _refuse_shared(weights: dict[str, Weight], path: str) -> None:
    """Rows that serve two roles cannot be scaled for one of them."""
    rows = {
        role: {(one.parameter, row) for head in one.heads for row in indices(head)} for role, one in weights.items()
    }
    if rows["q"] & rows["k"] or rows["v"] & (rows["q"] | rows["k"]):
        raise RemedyError(f"{path} makes several of queries, keys and values with the same weights; use temperature.")


def _multiply(
    patient: Patient, factors: dict[str, Tensor], weight: Weight, rows: Sequence[tuple[int, int, int]], by: Tensor
) -> None:
    shape = _parameter(patient, weight.parameter).shape
    number = torch.Size([shape[axis] for axis in weight.out_axes]).numel()
    whole = factors.setdefault(weight.parameter, torch.ones(number, dtype=torch.float64, device=by.device))
    whole[torch.tensor(indices(tuple(rows)), device=by.device)] *= by


def _scaled(parameter: Tensor, weight: Weight, factor: Tensor) -> Tensor:
    sizes = [parameter.shape[axis] if axis in weight.out_axes else 1 for axis in range(parameter.ndim)]
    if list(weight.out_axes) != sorted(weight.out_axes):
        raise RemedyError(f"the axes of {weight.parameter} are in another order than its heads.")
    return (parameter.double() * factor.to(parameter.device).reshape(sizes)).to(parameter.dtype)


def _added_after(patient: Patient, name: str, rows: int) -> str | None:
    """The bias that is added to what a weight makes: the one vector of that length beside it."""
    path = name.rpartition(".")[0]
    own = {n: p for n, p in module_at(patient.model, path)._parameters.items() if p is not None and p.ndim == 1}
    found = [n for n, p in own.items() if len(p) == rows]
    if own and len(found) != 1:
        raise RemedyError(f"which bias is added to what {name} makes is not known; use temperature.")
    return f"{path}.{found[0]}" if found else None


def _parameter(patient: Patient, name: str) -> Tensor:
    path, _, last = name.rpartition(".")
    module: nn.Module = module_at(patient.model, path)
    found = module._parameters.get(last)
    if found is None:
        raise RemedyError(f"{name} is made by a parametrisation; take it away first.")
    return found
