"""W_Q and W_K at the size for which first scores are neither flat nor frozen at the length that they are for."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fullrank.capture import undisturbed
from fullrank.capture.weights import Weight
from fullrank.edit import Call, Edit, rewrite_attention
from fullrank.errors import RemedyError
from fullrank.remedies.covering import notes_on_branches
from fullrank.remedies.parameter import Parameter
from fullrank.remedies.patient import Patient, Seen
from fullrank.remedies.remedy import remedy
from fullrank.remedies.weighing import change_weights, head_rows

__all__ = ["qk_scale_init", "strength_of"]

_ROUNDS, _ENOUGH = 30, 1e-6

Key = tuple[str, int, str]
"""Stack, layer and part of an attention call."""


def strength_of(call: Call, law: str, context: int | None) -> Tensor:
    """How strong the scores of each head are, in units of the law; proportional to the size of W_Q and of W_K.

    With n_t visible keys (or the context), `sqrt-log`: the mean over queries of std_s(a_ts)/√log n_t, b̂ of the random
    energy model, position biases left out where they can be told apart; `log`: the mean of scale·|q_t||k_s|/log n_t,
    what multiplies the cosine.

    Args:
        call: of a kernel, or of a softmax.
        law: `sqrt-log` or `log`.
        context: n in place of n_t.

    Returns:
        (heads,).

    Raises:
        RemedyError: for `log`, where queries and keys are not shown.
    """
    if call.query is None or call.key is None:
        if law == "log":
            raise RemedyError(f"{call.place.path} does not show its queries and keys; use law=sqrt-log.")
        assert call.logits is not None
        a = call.logits.double()
    else:
        q = call.query.double()
        k = call.key.double().repeat_interleave(q.shape[1] // call.key.shape[1], 1)
        scale = q.shape[-1] ** -0.5 if call.scale is None else call.scale
        a = scale * (q @ k.mT if law == "sqrt-log" else q.norm(dim=-1)[..., None] * k.norm(dim=-1)[..., None, :])
    visible = call.visible()
    seen = torch.ones_like(a, dtype=torch.bool) if visible is None else visible.expand_as(a)
    n = seen.sum(-1).double()
    a = torch.where(seen, a, 0.0)
    mean = a.sum(-1, keepdim=True) / n[..., None].clamp(min=1)
    variance = torch.where(seen, (a - mean) ** 2, 0.0).sum(-1) / n.clamp(min=1)
    length = n.clamp(min=2).log() if context is None else torch.full_like(n, math.log(context))
    rows = variance.sqrt() / length.sqrt() if law == "sqrt-log" else mean[..., 0] / length
    counted = (n >= 2).double()
    return (rows * counted).sum((0, 2)) / counted.sum((0, 2)).clamp(min=1)


@dataclass
class _Watch:
    """Measures every call; where asked, later layers see queries as they will be."""

    law: str
    context: int | None
    strength: float
    ahead: bool
    found: dict[str, list[Tensor]] = field(default_factory=dict)

    def __call__(self, call: Call) -> Call:
        if call.place.part.startswith("cross"):
            return call
        present = strength_of(call, self.law, self.context)
        self.found.setdefault(call.place.path, []).append(present)
        if not self.ahead:
            return call
        factor = (self.strength / present)[:, None, None]
        if call.query is not None:
            return call.change(query=(call.query * factor).to(call.query.dtype))
        assert call.logits is not None
        visible = call.visible()
        scaled = (call.logits * factor).to(call.logits.dtype)
        return call.change(logits=scaled if visible is None else torch.where(visible, scaled, call.logits))


@remedy(
    "qk-scale-init",
    "W_Q and W_K of the size that the context length asks for",
    addresses=(
        "averaging-heads",
        "context-dilution",
        "query-key-starvation",
        "entropy-collapse",
        "rank-collapse-depth",
    ),
    acts_on="weights",
    exactness="init-only",
    formula="W_Q, W_K ← √f·W per head, such that std_s(a_ts) = b·√log n_t (sqrt-log; frozen above b = √2), or that "
    "cosines are multiplied by β_n = b·log n_t (log; tokens merge below b = 1/(1 − ρ)); n_t keys that a query sees, "
    "or the context",
    papers=(
        "Giorlandino, Goldt: Two failure modes of deep transformers and how to avoid them, arXiv 2505.24333",
        "Chen, Lin, Polyanskiy, Rigollet, ICLR 2026, arXiv 2510.05554 (log)",
    ),
    keys=("giorlandino_goldt", "log_context"),
    parameters=(
        Parameter("b", "b̂ of the gauge, or γ of the logarithm", 1.0, above=0.0, low=0.0, high=100.0),
        Parameter(
            "law",
            "random scores need √log n, cosines log n",
            "sqrt-log",
            kind="choice",
            choices=("sqrt-log", "log"),
        ),
        Parameter(
            "context",
            "n, the length that it is for; none: of each query what it sees in the batch",
            None,
            kind="integer",
            low=2,
            optional=True,
        ),
    ),
    limits=(
        "For fresh weights: on trained ones it changes what each head attends to.",
        "Measured on the batch: scores of other inputs differ. Layers are set one after the other, each on what "
        "those before it make with theirs.",
        "With a context longer than the batch the spread is taken to be that of the batch.",
        "Where queries or keys are normalised behind W_Q and W_K their size changes nothing: refused.",
        "Heads that share keys share the size of W_K; W_Q takes up the rest. Position biases and biases of q and k "
        "stay.",
    ),
    cost="none; a few forwards when it is applied",
    structural=False,
)
def qk_scale_init(patient: Patient, *, b: float = 1.0, law: str = "sqrt-log", context: int | None = None) -> Edit:
    """Scale W_Q and W_K of each head of self-attention."""
    keys = {site.path: _keys(site.calls) for site in patient.self_attention}
    watch = _measured(patient, _Watch(law, context, b, ahead=True))
    factors = {path: _asked(found, b, path) for path, found in watch.found.items()}
    dtypes = {site.first.dtype for site in patient.self_attention}
    enough = max(_ENOUGH, *(8 * torch.finfo(dtype).eps for dtype in dtypes))  # rounded weights come no nearer
    notes = notes_on_branches(patient)
    for _ in range(_ROUNDS):
        edit = _scaled(patient, keys, factors)
        with edit.kept():
            found = _measured(patient, _Watch(law, context, b, ahead=False)).found
        off = {path: _to_all(patient, keys[path], _asked(each, b, path)) for path, each in found.items()}
        if all(bool(((one - 1).abs() < enough).all()) for one in off.values()):
            edit.notes += notes
            return edit
        edit.undo()
        factors = {path: factors[path] * off[path] for path in factors}
        if any(bool((one > 1e9).any()) or bool((one < 1e-9).any()) for one in factors.values()):
            break
    worst = max(off, key=lambda path: float((off[path] - 1).abs().max()))
    raise RemedyError(
        f"the scores of {worst} do not follow the size of W_Q and W_K: queries or keys are normalised behind them, its "
        "tokens are next to alike, or their biases are too large."
    )


def _keys(calls: Sequence[Seen]) -> list[Key]:
    return [(one.place.stack, one.place.layer, one.place.part) for one in calls]


def _measured(patient: Patient, watch: _Watch) -> _Watch:
    with (
        rewrite_attention(patient.model, patient.anatomy, before=watch),
        undisturbed(patient.model),
        torch.no_grad(),
    ):
        patient.forward()
    return watch


def _asked(found: list[Tensor], b: float, path: str) -> Tensor:
    """(heads,) by what scores are to be multiplied; a module that is called several times is set by its mean call."""
    present = torch.stack(found).mean(0)
    if not bool((present > 0).all()):
        raise RemedyError(f"the scores of {path} are all alike, so that no size of W_Q and W_K spreads them.")
    return b / present


def _scaled(patient: Patient, keys: Mapping[str, list[Key]], factors: Mapping[str, Tensor]) -> Edit:
    of = {key: factors[path] for path, each in keys.items() for key in each}
    key_weights = {(stack, layer, one.call): one for stack, layer, one in patient.weights("k", part="self")}

    def new(stack: str, layer: int, weight: Weight) -> Callable[[Tensor], Tensor]:
        factor = of.get((stack, layer, weight.call))
        if factor is None:
            raise RemedyError(f"W_Q and W_K of {stack} layer {layer} serve no attention that was seen.")
        size = _sizes(factor, weight, key_weights.get((stack, layer, weight.call)))
        return lambda W: W * (size if isinstance(size, float) else size.to(W)[:, None])

    return change_weights(patient, new, "q", "k", part="self")


def _sizes(factor: Tensor, weight: Weight, key: Weight | None) -> Tensor | float:
    """By what the rows of W_Q or W_K are multiplied."""
    rows = head_rows(weight)
    shared = [] if key is None else head_rows(key)
    if len(rows) != len(factor) or len(shared) != len(factor):
        return float(factor.log().mean().div(2).exp())
    groups: dict[tuple[int, ...], list[int]] = {}
    for head, numbers in enumerate(shared):
        groups.setdefault(tuple(numbers), []).append(head)
    size = torch.ones(max(max(numbers) for numbers in rows) + 1, dtype=torch.float64)
    for heads in groups.values():
        common = factor[heads].log().mean().div(2).exp()
        for head in heads:
            size[rows[head]] = (common if weight.role == "k" else factor[head] / common).cpu()
    return size


def _to_all(patient: Patient, keys: list[Key], off: Tensor) -> Tensor:
    """Where heads are not told apart, one factor for all."""
    whole = [
        one
        for stack, layer, one in patient.weights("q", "k", part="self")
        if (stack, layer, one.call) in keys and len(one.heads) != len(off)
    ]
    return off.log().mean().exp().expand_as(off) if whole else off
